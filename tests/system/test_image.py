"""The container image, built for real by `python -m jobs image` on a base made here, with a slice of the packages.

Torch and all that comes with it stay out: they would take an hour and tens of GB, and change nothing of what is tested.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from jobs import spec
from tests.cli import REPOSITORY, Shell
from tests.conftest import need

pytestmark = pytest.mark.system

TAG, SLICE = "retort:test", "omegaconf google-crc32c tqdm boto3"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"  # where Debian keeps them
# The driver that copies whole layers: slow, and the one that works on every file system and mounts nothing.
STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{0}/images"\nrunroot = "{0}/run"\n'
BASE = "FROM scratch\nADD base.tar /\nRUN useradd --uid 1000 ubuntu\n"  # the user that Ubuntu's images have
# A pod's root file system: read-only but for three folders; arguments: root, size of /dev/shm, command.
READ_ONLY = """set -e
root=$1 shm=$2; shift 2
mount --bind "$root" "$root"
mount -o remount,ro,bind "$root"
for folder in tmp cache dev; do mount -t tmpfs -o mode=1777 none "$root/$folder"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size="$shm" none "$root/dev/shm"
for device in null urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -t proc none "$root/proc"
exec chroot --userspec=1000:1000 "$root" "$@"
"""


@dataclass(frozen=True)
class Buildah:
    """A store of images of our own, in one folder."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        certificates = ssl.get_default_verify_paths().cafile or CERTIFICATES
        options = f"-v {certificates}:{CERTIFICATES}:ro --build-arg 'PACKAGES={SLICE}'"
        return {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(self.folder), "RETORT_BUILD_ENGINE": "buildah", "RETORT_BUILD_OPTIONS": options,
        }  # fmt: skip

    def try_(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, env = ["buildah", *arguments], {**os.environ, **self.env}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=400)

    def __call__(self, *arguments: str) -> str:
        done = self.try_(*arguments)
        assert done.returncode == 0, f"buildah {arguments}:\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    @cached_property
    def base(self) -> str:
        """By digest."""
        (digest,) = {image["digest"] for image in json.loads(self("images", "--digests", "--json", "localhost/base"))}
        return f"localhost/base@{digest}"


@dataclass(frozen=True)
class Image:
    """The image, a container of it, and that container's files."""

    buildah: Buildah
    said: str  # by the verb
    container: str
    root: str

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", TAG))["Docker"]["config"]
        return found

    def run(self, *command: str) -> str:
        """What a command prints; asked again, as buildah loses that of a short one now and then on a busy machine."""
        said = (self.buildah("run", self.container, "--", *command) for _ in range(3))
        return next(filter(None, said), "")

    def run_read_only(self, *command: str, shm: str = "2g") -> subprocess.CompletedProcess[str]:
        inside = ["env", "-i", *self.config["Env"], *command]
        outside = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", self.root, shm]
        return subprocess.run([*outside, *inside], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    """With a base in it. Skipped where that cannot be made, except where CI=true."""
    need(("buildah", "mmdebstrap"), "buildah mmdebstrap")
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    engine = Buildah(folder)
    try:
        (folder / "storage.conf").write_text(STORAGE.format(folder))
        (folder / "Dockerfile").write_text(BASE)
        debian = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", "bookworm"]
        subprocess.run([*debian, str(folder / "base.tar")], check=True, timeout=300)
        engine("build", "--quiet", "--tag", "localhost/base", str(folder))
        yield engine
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Image:
    jobs = Shell(tmp_path_factory.mktemp("elsewhere"), **buildah.env)
    said = jobs("image", "--base", buildah.base, "--tag", TAG, "--dirty")
    container = buildah("from", TAG)
    return Image(buildah, said, container, buildah("mount", container))


def test_the_command_line_runs_inside_as_a_user_of_its_own(image: Image) -> None:
    assert "75 preempted" in " ".join(image.run("python", "-m", "jobs", "--help").split())
    assert "make submit RECIPE=NAME" in image.run("python", "-m", "jobs", "recipes")
    assert image.run("id") == "uid=1000(retort) gid=1000(retort) groups=1000(retort)"
    assert image.run("bash", "-c", "pwd && mkdir .retort && rmdir .retort") == "/work"
    assert image.run("bash", "-c", "type -P bash wget tini python").split() == [
        "/usr/bin/bash", "/usr/bin/wget", "/usr/bin/tini", "/opt/venv/bin/python",
    ]  # fmt: skip


def test_the_verb_says_what_it_did_and_how_big_it_is(image: Image) -> None:
    assert image.said.startswith("$ buildah build --format docker --file docker/Dockerfile --target train ")
    last = image.said.strip().splitlines()[-1]
    assert last.startswith(f"image: {TAG}, ")
    assert last.endswith("MB")


def test_it_says_what_it_was_made_from(image: Image) -> None:
    commit = str(spec.code())
    labels = {
        name.rpartition(".")[2]: text for name, text in image.config["Labels"].items() if "opencontainers" in name
    }
    assert labels.pop("created").startswith("20")
    assert labels == {
        "title": "Retort", "description": "Distils vision foundation models on a cluster", "licenses": "Apache-2.0",
        "revision": commit, "version": "0.1.0",
    }  # fmt: skip
    assert image.run("python", "-c", "from jobs.spec import code; print(code())") == commit


def test_it_starts_what_it_is_told_to(image: Image) -> None:
    config = image.config
    assert (config["User"], config["WorkingDir"]) == ("1000:1000", "/work")
    assert (config["Entrypoint"], config["Cmd"]) == (["tini", "--"], ["python", "-m", "jobs", "--help"])
    names = {pair.partition("=")[0] for pair in config["Env"]}
    own = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "HOME", "RETORT_COMMIT"}
    assert names == {"PATH", *own}  # and nothing of where it was built
    started = image.run(*config["Entrypoint"], *config["Cmd"])
    assert started.startswith("usage: python -m jobs")


def test_nothing_is_in_it_that_running_does_not_need(image: Image) -> None:
    for tool in ("cc", "gcc", "g++", "clang", "nvcc", "make", "ld", "pip", "uv", "git"):
        assert image.run("bash", "-c", f"type -P {tool} || echo none") == "none", tool
    root = Path(image.root)
    assert sorted(path.name for path in (root / "opt").iterdir()) == ["retort", "venv"]
    wanted = {"LICENSE", "README.md", "core", "jobs", "pyproject.toml", "requirements.lock", "slurm"}
    assert {path.name for path in (root / "opt/retort").iterdir()} - {"k8s", "__pycache__"} == wanted
    packages = json.loads(
        image.run("python", "-c", "import json; from jobs.spec import packages; print(json.dumps(list(packages())))")
    )
    assert {"omegaconf", "botocore"} <= set(packages)  # the slice, and what it needs
    assert not {"pytest", "mypy", "uv", "pip", "torch"} & set(packages)
    for leftover in ("var/lib/apt/lists", "root", "tmp"):
        assert not [path for path in (root / leftover).rglob("*") if path.is_file() and path.stat().st_size > 1e4]


def test_its_code_is_compiled_and_cannot_be_written(image: Image) -> None:
    assert list(Path(image.root, "opt/retort/jobs/__pycache__").glob("cli.*.pyc"))
    assert image.run("find", "/opt", "/usr", "-writable", "-not", "-type", "l", "-print") == ""


def test_it_is_healthy_on_a_read_only_root(image: Image) -> None:
    assert image.run_read_only("touch", "/home/x").returncode != 0
    assert image.run_read_only("bash", "-c", "mkdir $HOME && touch $HOME/x /cache/x /dev/shm/x").returncode == 0
    kind, *health = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    done = image.run_read_only(*health)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    done = image.run_read_only(*health, shm="64m")
    assert done.returncode == 3
    assert "FAIL  shared memory" in done.stdout
    status = image.run_read_only("python", "-m", "jobs", "status", "--store", "file:///cache/store")
    assert status.returncode == 0, status.stderr


@pytest.mark.parametrize(
    ("base", "said"), [([], "BASE"), (["--build-arg", "BASE=localhost/base:latest"], "give BASE=NAME@sha256:")]
)
def test_a_base_without_a_digest_is_refused_by_the_build_itself(buildah: Buildah, base: list[str], said: str) -> None:
    done = buildah.try_("build", *base, "--file", "docker/Dockerfile", "--target", "base", ".")
    assert done.returncode != 0
    assert said in done.stderr
