"""image: what it refuses, which engine it takes, and what it tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli, spec
from jobs.errors import BUG, NOT_READY, USER

BASE = f"debian@sha256:{'ab' * 32}"
ENGINE = """#!/bin/sh
case $1 in
  info) exit {answers} ;;
  images) echo "1.5 GB" ;;
  build) pwd > {record}; printf '%s\\n' "$@" >> {record}; exit {builds} ;;
esac
"""


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETORT_BUILD_ENGINE", "RETORT_BUILD_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spec, "code", lambda: spec.Code("c0ffee", False))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts engines on an otherwise bare PATH; returns where they write down what they were to build."""

    def put(answers: dict[str, bool], builds: bool = True) -> Path:
        folder, record = tmp_path / "bin", tmp_path / "record"
        folder.mkdir()
        for name, good in answers.items():
            text = ENGINE.format(answers=int(not good), record=record, builds=int(not builds))
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return record

    return put


def build(*options: str) -> int:
    return cli.main(["image", "--base", BASE, *options])


@pytest.mark.parametrize("base", ["", "debian:bookworm-slim", "debian@sha256:abc", f"{BASE}ab", f"two {BASE}"])
def test_a_base_is_asked_for_by_digest(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["image", *(["--base", base] if base else [])]) == USER
    error = capsys.readouterr().err
    assert error.startswith(f"error: BASE is {repr(base) if base else 'not set'}: ")
    assert "BASE=NAME@sha256:" in error
    assert "CUDA" in error


def test_an_unknown_target_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--target", "trian") == USER
    assert "did you mean train?" in capsys.readouterr().err


def test_the_first_engine_that_answers_builds(engines: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    record = engines({"docker": False, "podman": True, "buildah": True})
    assert build("--tag", "mine:1", "--target", "demo") == 0
    folder, *words = record.read_text().splitlines()
    assert folder == str(spec.REPOSITORY)
    assert words[:3] == ["build", "--format", "docker"]
    assert words[-1] == "."
    assert words[words.index("--tag") + 1] == "mine:1"
    assert words[words.index("--target") + 1] == "demo"
    assert {f"BASE={BASE}", "COMMIT=c0ffee", "VERSION=0.1.0"} <= set(words)
    out = capfd.readouterr().out
    assert out.startswith("$ podman build ")
    assert out.endswith("image: mine:1, 1.5 GB\n")


def test_an_engine_can_be_chosen(engines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    record = engines({"docker": True, "buildah": True})
    assert build() == 0
    assert "--format" not in record.read_text()
    monkeypatch.setenv("RETORT_BUILD_ENGINE", "buildah")
    assert build() == 0
    assert "--format" in record.read_text()


def test_options_go_to_the_engine_as_a_shell_would_split_them(
    engines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = engines({"buildah": True})
    monkeypatch.setenv("RETORT_BUILD_OPTIONS", "-v /a:/b:ro --build-arg 'X=https://me:pa55@host/a b'")
    assert build() == 0
    assert record.read_text().splitlines()[-5:] == ["-v", "/a:/b:ro", "--build-arg", "X=https://me:pa55@host/a b", "."]
    assert "pa55" not in capfd.readouterr().out
    monkeypatch.setenv("RETORT_BUILD_OPTIONS", "-v 'x")
    assert build() == USER
    assert "RETORT_BUILD_OPTIONS" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("there", "chosen", "code", "said"),
    [
        ({}, "", NOT_READY, "apt-get install buildah"),
        ({"docker": False}, "", NOT_READY, "docker is installed and does not answer; `docker info` must"),
        ({"docker": True}, "podman", NOT_READY, "no podman works here"),
        ({"docker": True}, "bildah", USER, "did you mean buildah?"),
    ],
)
def test_without_an_engine_it_says_what_would_help(
    engines: Callable[..., Path], there: dict[str, bool], chosen: str, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record = engines(there)
    monkeypatch.setenv("RETORT_BUILD_ENGINE", chosen)
    assert build() == code
    assert said in capsys.readouterr().err
    assert not record.exists()


def test_uncommitted_changes_need_dirty_and_are_marked(
    engines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = engines({"buildah": True})
    monkeypatch.setattr(spec, "code", lambda: spec.Code("c0ffee", True))
    assert build() == USER
    assert not record.exists()
    assert build("--dirty") == 0
    assert "COMMIT=c0ffee-dirty" in record.read_text().splitlines()


def test_a_build_that_fails_has_no_traceback(engines: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    engines({"buildah": True}, builds=False)
    assert build() == BUG
    captured = capfd.readouterr()
    assert captured.err == "error: buildah could not build the image (exit 1): what it says above is the reason\n"
    assert "image:" not in captured.out
