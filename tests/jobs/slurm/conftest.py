"""SLURM's programs, played back from what real ones have said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.launchers.slurm import LAUNCHER
from jobs.slurm import queue

Says = Callable[..., None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """says(program, standard output, standard error, exit code): what a program on PATH answers from here on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    queue.cluster_name.cache_clear()

    def answer(program: str, out: str = "", error: str = "", code: int = 0) -> None:
        LAUNCHER._looks.forget()
        (folder / f"{program}.out").write_text(out)
        (folder / f"{program}.err").write_text(error)
        own = folder / program
        own.write_text(f'#!/bin/sh\necho "$0 $*" >> {folder}/asked\ncat {own}.out\ncat {own}.err >&2\nexit {code}\n')
        own.chmod(0o755)

    for program in ("squeue", "sacct", "scontrol", "sinfo", "scancel", "sbatch"):
        answer(program, error=f"{program}: error: not expected here", code=1)
    return answer


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[], list[str]]:
    """Commands that have been given so far."""
    path = tmp_path / "bin" / "asked"
    return lambda: [os.path.basename(line) for line in path.read_text().splitlines()] if path.exists() else []
