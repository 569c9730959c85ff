"""image: build docker/Dockerfile from this commit, with whichever of docker, podman and buildah is there.

RETORT_BUILD_ENGINE chooses among them. RETORT_BUILD_OPTIONS is handed to the engine's `build` as it is, with a shell's
quotes: podman and buildah take `-v /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro` where TLS
is inspected and `--isolation chroot` where nothing else is allowed, all three `--build-arg PYTHON=python3.11`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from datetime import UTC, datetime

from jobs import spec
from jobs.errors import OK, JobError, NotReady, UserError, nearest, redact
from jobs.settings import Settings

# The format that keeps the health check; docker's own, and an option for the others.
ENGINES = {"docker": [], "podman": ["--format", "docker"], "buildah": ["--format", "docker"]}
TARGETS = ("train", "demo")
DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
PROBE_S = 30
BASE_HOW = (
    "give the image to build on by its digest, BASE=NAME@sha256:...: for TARGET=train the `base` flavour of a CUDA "
    "image (nvidia/cuda), for TARGET=demo a slim Debian; `skopeo inspect docker://NAME:TAG` and the registry's page of "
    "a tag show the digest"
)


def image(settings: Settings) -> int:
    """Raises UserError, NotReady, and JobError when the engine fails."""
    base, target, tag = settings.base, settings.target or TARGETS[0], settings.tag or "retort:latest"
    if not DIGEST.fullmatch(base):
        raise UserError(f"BASE {f'is {base!r}' if base else 'is not set'}: {BASE_HOW}")
    if target not in TARGETS:
        raise UserError(f"TARGET: {target!r} is none of {', '.join(TARGETS)}{nearest(target, TARGETS)}")
    current = spec.code()
    spec.require_clean(current, settings.dirty)
    name = engine()
    command = [name, "build", *ENGINES[name], "--file", "docker/Dockerfile", "--target", target, "--tag", tag]
    for argument, value in {"BASE": base, **arguments(current)}.items():
        command += ["--build-arg", f"{argument}={value}"]
    command += [*options(), "."]
    print(redact(f"$ {shlex.join(command)}"), flush=True)
    # Without it docker falls back on a builder that knows no mounts.
    done = subprocess.run(command, cwd=spec.REPOSITORY, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    if done.returncode != 0:
        raise JobError(f"{name} could not build the image (exit {done.returncode}): what it says above is the reason")
    print(f"image: {tag}, {_ask(name, 'images', '--format', '{{.Size}}', tag) or 'size unknown'}")
    return OK


def engine() -> str:
    """The first engine that answers.  Raises UserError, NotReady."""
    chosen = os.environ.get("RETORT_BUILD_ENGINE", "")
    if chosen and chosen not in ENGINES:
        raise UserError(f"RETORT_BUILD_ENGINE: {chosen!r} is none of {', '.join(ENGINES)}{nearest(chosen, ENGINES)}")
    there = [name for name in ([chosen] if chosen else ENGINES) if shutil.which(name)]
    for name in there:
        if _ask(name, "info") is not None:
            return name
    silent = f": {', '.join(there)} is installed and does not answer" if there else ""
    raise NotReady(
        f"no {chosen or 'container engine'} works here{silent}; `{(there or ['docker'])[0]} info` must; "
        "on Debian, Ubuntu: apt-get install buildah"
    )


def arguments(current: spec.Code) -> dict[str, str]:
    """What the image says of itself."""
    project = tomllib.loads((spec.REPOSITORY / "pyproject.toml").read_text())["project"]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"COMMIT": str(current), "VERSION": project["version"], "CREATED": now}


def options() -> list[str]:
    try:
        return shlex.split(os.environ.get("RETORT_BUILD_OPTIONS", ""))
    except ValueError as error:
        raise UserError(f"RETORT_BUILD_OPTIONS: {error}") from None


def _ask(name: str, *arguments: str) -> str | None:
    """What the engine answers; None when it fails or is silent."""
    try:
        done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=PROBE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
