"""Set-up: refuses machines it cannot work on, notices a stale environment, and starts under old interpreters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import bootstrap
from jobs.bootstrap import Refusal
from jobs.spec import REPOSITORY


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_other_platforms_are_refused(system: str, machine: str) -> None:
    with pytest.raises(Refusal, match=f"Linux x86-64, and this is {system} {machine}"):
        bootstrap.check_platform(system, machine)
    bootstrap.check_platform("Linux", "x86_64")


def test_an_old_python_is_refused_and_a_newer_one_named() -> None:
    with pytest.raises(Refusal, match=r"3\.9; use it: make PYTHON=python3\.12"):
        bootstrap.check_python((3, 9), [], ["python3.12"])
    with pytest.raises(Refusal, match=r"3\.9; install it"):
        bootstrap.check_python((3, 9), [], [])
    bootstrap.check_python((3, 11), [], [])


def test_a_python_without_venv_is_refused_with_the_package_that_has_it() -> None:
    with pytest.raises(Refusal, match=r"lacks ensurepip: apt-get install python3\.11-venv"):
        bootstrap.check_python((3, 11), ["ensurepip"], [])


def test_a_machine_too_small_for_the_demo_is_refused() -> None:
    with pytest.raises(Refusal, match="8 GB of memory; this machine has 4.0 GB"):
        bootstrap.check_size(4 * 10**9, 10**12, 10)
    with pytest.raises(Refusal, match="10 GB of free disk"):
        bootstrap.check_size(16 * 10**9, 9 * 10**9, 10)
    bootstrap.check_size(int(7.7e9), 10 * 10**9, 10)  # what a machine of 8 GB shows


def test_it_parses_under_the_oldest_interpreter_it_promises_to_refuse() -> None:
    ast.parse((REPOSITORY / "jobs" / "bootstrap.py").read_text(), feature_version=(3, 6))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A set-up as it is left behind: an environment that runs, and its stamp."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "requirements.lock").write_text("a==1\n")
    (tmp_path / "jobs" / "bootstrap.lock").write_text("uv==1\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "retort.stamp").write_text(bootstrap.wanted_stamp(tmp_path))
    return tmp_path


def test_a_set_up_is_done_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "call", lambda command: pytest.fail("nothing is to be installed"))
    bootstrap.set_up(project)


@pytest.mark.parametrize("change", ["requirements.lock", "jobs/bootstrap.lock", "python", "stamp"])
def test_a_stale_set_up_is_done_again(project: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "python":
        (project / ".venv" / "bin" / "python").unlink()
    elif change == "stamp":
        (project / ".venv" / "retort.stamp").unlink()
    else:
        (project / change).write_text("other==2\n")
    assert not bootstrap.is_fresh(project)
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "call", commands.append)
    bootstrap.set_up(project)
    assert all("--require-hashes" in command for command in commands if "install" in command)
    packages = next(command for command in commands if command[-1].endswith("requirements.lock"))
    assert "--compile-bytecode" in packages
    assert packages[packages.index("--build-constraints") + 1] == packages[-1]
    assert all(command[1] == "-P" for command in commands), "nothing of the folder it is called from is imported"
    assert ("venv" in commands[0]) == (change == "python")
    assert (project / ".venv" / "retort.stamp").read_text() == bootstrap.wanted_stamp(project)


def test_a_set_up_that_fails_leaves_no_stamp(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".venv" / "retort.stamp").unlink()
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command: int("install" in command))
    with pytest.raises(Refusal, match="run it again"):
        bootstrap.set_up(project)
    assert not (project / ".venv" / "retort.stamp").exists()


def test_a_refusal_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "riscv64")
    assert bootstrap.main([]) == 3
    assert capsys.readouterr().err.startswith("error: Retort runs on Linux x86-64, and this is Linux riscv64")


def test_what_source_distributions_are_built_with_is_pinned() -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    assert re.search(r"^setuptools==[\d.]+ \\\n    --hash=sha256:", text, re.MULTILINE)
    assert "--build-constraints" in (REPOSITORY / "docker" / "install.py").read_text()


def test_the_installer_is_pinned_with_hashes() -> None:
    text = (REPOSITORY / "jobs" / "bootstrap.lock").read_text()
    assert re.search(r"^uv==[\d.]+ \\$", text, re.MULTILINE)
    assert text.count("--hash=sha256:") > 5
    assert "http" not in text


def test_ci_installs_what_is_missing_and_runs_lint_and_tests() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for name in ("run", "as-newcomer"):
        script = REPOSITORY / ".ci" / name
        done = subprocess.run([shellcheck, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert script.stat().st_mode & 0o111
    text = (REPOSITORY / ".ci" / "run").read_text()
    for words in ("apt-get update", "--no-install-recommends", "make lint", "newcomer make test", "make test-system"):
        assert words in text
    listing = ["make", "--no-print-directory", "packages"]
    packages = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    assert {"radosgw", "slurm-wlm", "buildah"} < set(packages)
