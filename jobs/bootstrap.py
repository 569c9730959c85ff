"""Set-up from the lock file, before anything but Python itself is there: run as a script, also by older interpreters.

`python3 jobs/bootstrap.py [demo]` makes .venv when it is missing or stale and says how long that took. It refuses, with
exit code 3, a machine on which nothing would work; for `demo` also one that is too small.
"""
# ruff: noqa: UP006, UP035 - an interpreter as old as 3.6 must get as far as the refusal

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Tuple

NOT_READY = 3
OLDEST = (3, 11)
DEMO_MEMORY_GB, DEMO_DISK_GB, WORK_DISK_GB = 8, 10, 2
MEMORY_SLACK = 0.85  # a machine sold as 8 GB shows less: firmware and kernel keep a part
ROOT = Path(__file__).resolve().parent.parent


class Refusal(Exception):  # noqa: N818
    """This machine is not ready; the message says what to do."""


def main(arguments: List[str]) -> int:
    try:
        check_platform(platform.system(), platform.machine())
        fresh = is_fresh(ROOT)
        if "demo" in arguments:
            need = WORK_DISK_GB if fresh else DEMO_DISK_GB
            check_size(memory_bytes(), shutil.disk_usage(str(ROOT)).free, need)
        if not fresh:
            check_python(sys.version_info[:2], missing_modules(), other_pythons())
            set_up(ROOT)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return NOT_READY
    return 0


def check_platform(system: str, machine: str) -> None:
    if (system, machine) != ("Linux", "x86_64"):
        raise Refusal(f"Retort runs on Linux x86-64, and this is {system} {machine}: use such a machine")


def check_python(version: Tuple[int, int], lacking: List[str], others: List[str]) -> None:
    """version: (major, minor).  lacking: standard modules that are not there.  others: newer interpreters on PATH."""
    running = ".".join(map(str, version))
    if version < OLDEST:
        how = f"use it: make PYTHON={others[0]} ..." if others else "install it, then: make PYTHON=python3.11 ..."
        raise Refusal(f"Python 3.11 or newer is needed, and python3 is {running}; {how}")
    if lacking:
        raise Refusal(
            f"Python {running} lacks {' and '.join(lacking)}: apt-get install python{running}-venv on Debian, Ubuntu; "
            "elsewhere choose a complete Python with make PYTHON=..."
        )


def check_size(memory: int, disk: int, disk_gb: int) -> None:
    """memory: bytes in all.  disk: bytes that are free."""
    if memory < DEMO_MEMORY_GB * 1e9 * MEMORY_SLACK:
        raise Refusal(f"the demo needs {DEMO_MEMORY_GB} GB of memory; this machine has {memory / 1e9:.1f} GB")
    if disk < disk_gb * 1e9:
        raise Refusal(f"the demo needs {disk_gb} GB of free disk under {ROOT}; there are {disk / 1e9:.1f} GB")


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def missing_modules() -> List[str]:
    return [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]


def other_pythons() -> List[str]:
    return [name for name in ("python3.11", "python3.12", "python3.13") if shutil.which(name)]


def wanted_stamp(root: Path) -> str:
    digest = hashlib.sha256()
    for name in ("requirements.lock", "jobs/bootstrap.lock"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_fresh(root: Path) -> bool:
    """Whether .venv was made from the lock files as they are now, and still runs."""
    stamp = root / ".venv" / "retort.stamp"
    return stamp.is_file() and stamp.read_text() == wanted_stamp(root) and runs(root / ".venv" / "bin" / "python")


def runs(python: Path) -> bool:
    return python.exists() and subprocess.call([str(python), "-c", ""]) == 0


def set_up(root: Path) -> None:
    """Make or refresh .venv; of two set-ups at once the second waits and finds it done.  Raises Refusal."""
    with (root / "requirements.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_fresh(root):
            return
        begun = time.time()
        print("set-up: Python packages from requirements.lock into .venv (once; several GB) ...", flush=True)
        python = root / ".venv" / "bin" / "python"
        if not runs(python):
            call([sys.executable, "-P", "-m", "venv", "--clear", str(root / ".venv")])
        pip = [str(python), "-P", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        call([*pip, "--require-hashes", "-r", str(root / "jobs" / "bootstrap.lock")])
        # Compiled here, once: where PYTHONDONTWRITEBYTECODE is set each process would spend 15 s on it, on every start.
        uv = [str(python), "-P", "-m", "uv", "pip", "install", "--compile-bytecode", "--python", str(python)]
        packages = str(root / "requirements.lock")  # holds also what DeepSpeed, a source distribution, is built with
        call([*uv, "--require-hashes", "--build-constraints", packages, "-r", packages])
        (root / ".venv" / "retort.stamp").write_text(wanted_stamp(root))
        print(f"set-up: {time.time() - begun:.0f} s", flush=True)


def call(command: List[str]) -> None:
    if subprocess.call(command) != 0:
        line = " ".join(command)
        raise Refusal(f"set-up failed at: {line}\n(see above; is the package index reachable? then run it again)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
