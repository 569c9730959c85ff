"""The words that start a run on the head of a Ray cluster, and how they are read there."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Mapping, Sequence

from jobs.errors import line as one_line
from jobs.placement import Placement

KUBERNETES = "kubernetes:"  # and context/namespace: where a run is, in its record; else the address of a Ray cluster


def tagged(run: str, root: str) -> str:
    """A run's id made one of its own among all stores: the same recipe has the same id in each."""
    return f"{run}-{hashlib.sha256(root.encode()).hexdigest()[:4]}"


def line(python: str, run: str, root: str, job: str, at: str, placement: Placement, cpus: int, after: str = "") -> str:
    """One line of shell: the entry point of a Ray job.  cpus: of a rank.  after: verbs, eval,export."""
    words = [python, "-m", "jobs.ray.entry", "--run", run, "--store", root, "--job", job, "--at", at,
             "--ranks", placement.ranks, "--device", placement.device, "--threads", placement.threads, "--cpus", cpus,
             *(["--after", after] if after else [])]  # fmt: skip
    return _joined(words)


def workers(
    python: str, arguments: Sequence[str], count: int, each: Mapping[str, float], threads: int, retried: bool = False
) -> str:
    """One line of shell: starts so many tasks of `python ARGUMENTS`, each with what it takes of a node.

    retried: the job is started again when it fails.
    """
    own = ["--count", count, "--cpus", each["CPU"], "--gpus", each.get("GPU", 0), "--threads", threads,
           *["--retried"] * retried]  # fmt: skip
    return _joined([python, "-m", "jobs.ray.workers", *own, "--", *arguments])


def _joined(words: Sequence[object]) -> str:
    """Raises UserError for a word that is more than a line."""
    return shlex.join(one_line(str(word), "the Ray job's command") for word in words)


def parser(program: str, *further: str) -> argparse.ArgumentParser:
    """Reads what `line` has written; `further` are options of this program's own."""
    found = argparse.ArgumentParser(prog=program)
    for name in ("run", "store", "device"):
        found.add_argument(f"--{name}", required=True)
    for name in ("ranks", "threads", "cpus"):
        found.add_argument(f"--{name}", type=int, required=True)
    for name in further:
        found.add_argument(f"--{name}", type=int if name == "attempt" else str, required=name != "after", default="")
    return found


def told(each: dict[str, float]) -> str:
    """`1 CPU and 1 GPU`"""
    return " and ".join(f"{number:g} {name}{'s' * (number != 1)}" for name, number in each.items())
