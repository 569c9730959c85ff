"""Launchers: the same verbs over a machine and over schedulers. Each is one file, found by its name."""

from __future__ import annotations

import importlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import NotReady, UserError, nearest
from jobs.placement import Placement, spread

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.cluster import Cluster
    from jobs.record import Run

BUILT = ("local", "slurm", "ray")
CLUSTER: ContextVar[str] = ContextVar("CLUSTER", default="")  # file of the command that runs now


class Elsewhere(NotReady):  # noqa: N818 (says where the run is)
    """By its record a run is where this machine is not set up to look, so nobody there is asked anything."""


@dataclass(frozen=True)
class Look:
    """What a launcher sees of a run's newest attempt from this machine."""

    alive: bool | None  # somebody works on it or will; None: that cannot be told from here
    text: str = ""  # in the scheduler's words


class Looks:
    """Answers that hold for a few seconds: who follows a run must not wear a scheduler out."""

    def __init__(self, hold_s: float = 4.0) -> None:
        self.hold_s = hold_s
        self._seen: dict[str, tuple[float, Look]] = {}  # by job

    def at(self, job: str, ask: Callable[[], Look]) -> Look:
        when, look = self._seen.get(job, (float("-inf"), Look(None)))
        if time.monotonic() - when > self.hold_s:
            look = ask()
            self._seen[job] = time.monotonic(), look
        return look

    def forget(self) -> None:
        self._seen.clear()


@dataclass(frozen=True)
class Order:
    """One attempt to start."""

    run: Run
    recipe: Recipe
    attempt: int
    info: dict[str, Any]  # for the transition to `queued`
    after: tuple[str, ...] = field(default=())  # verbs to run on the run once it has succeeded


class Launcher(ABC):
    """Starts the ranks of a run somewhere and can reach them again through what it wrote into the run's record.

    Whoever may write to the store can write that info as well. So it only ever narrows what this machine is set up for:
    no address, context, folder or option comes from there, and what is ended bears this run's name.
    """

    name: str
    shares_tree: bool  # ranks see this working tree and this machine's file:// stores
    queues: bool  # takes many runs at once, and jobs that wait for others
    example = ""  # cluster file to render a manifest with where none is given: it cannot do without one

    def at(self, cluster: Cluster) -> Launcher:
        """This launcher with the settings of a cluster file."""
        return self

    @abstractmethod
    def gpus(self) -> int:
        """GPUs that a run may be given."""

    @abstractmethod
    def place(self, recipe: Recipe) -> Placement:
        """Ranks, device and threads of a run.  Raises UserError."""

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:  # noqa: B027 (nothing to check is fine)
        """Refuse what the scheduler would, or would never start.  Raises UserError, NotReady."""

    @abstractmethod
    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        """Move each run to `queued`, write down its recipe and start it; False where somebody else was first."""

    def by_hand(self) -> Launcher:
        """The launcher whose jobs people can submit themselves."""
        return self

    def render(self, run: Run, recipe: Recipe, placement: Placement) -> Path:
        """Write what would be submitted into a file, to look at or to submit by hand.  Raises UserError, NotReady."""
        raise UserError(f"LAUNCHER: {self.name} submits nothing that could be rendered; use slurm or ray")

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        """Start so many of `python ARGUMENTS`, which share their work through the store and have no record.

        placement: of one of them.  Where there is a queue this returns at once, with what was started and how to look
        at it; elsewhere when all have ended.  Raises UserError, NotReady.
        """
        raise UserError(f"LAUNCHER: {self.name} starts no workers; use local or slurm")

    @abstractmethod
    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ask the ranks behind a transition's info to save and end; False when they cannot be reached from here.

        at_once: they have been asked before and are still there.
        """

    @abstractmethod
    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        """Whether anybody still works on the run."""

    def folder(self) -> Path:
        """Where logs of runs lie, each in a folder of its own."""
        return Path.cwd() / ".retort" / "logs"

    def logs(self, run: Run, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        """What can be had from here of an attempt's logs, by name."""
        own = self.folder() / run.id
        found = sorted((own / f"attempt-{attempt:04d}").glob("*.log")) if info.get("logs") == str(own) else []
        return {path.name: path.read_bytes() for path in found}


class OnSite(Launcher):
    """A launcher for nodes that a cluster file describes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def gpus(self) -> int:
        """As many as a run asks for, where nodes have any: the scheduler knows how many there are."""
        return sys.maxsize if self.cluster.gpus_per_node else 0

    def place(self, recipe: Recipe) -> Placement:
        own = self.cluster
        return spread(recipe, own.per_node, own.gpus_per_node, own.cpus_per_task)


def find(name: str) -> Launcher:
    """The launcher of this name.  Raises UserError."""
    if name not in BUILT:
        known = ("auto", *BUILT)
        raise UserError(f"LAUNCHER: {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
    launcher: Launcher = importlib.import_module(f"jobs.launchers.{name}").LAUNCHER
    return launcher


@contextmanager
def configured(cluster: str) -> Iterator[None]:
    """While a command runs: the cluster file that it was given, "" for none."""
    token = CLUSTER.set(cluster)
    try:
        yield
    finally:
        CLUSTER.reset(token)


def of(info: Mapping[str, Any]) -> Launcher:
    """The launcher of a run by its record, with what this machine is set up for.  Raises Elsewhere, ConfigError."""
    name, cluster = info.get("launcher", "local"), CLUSTER.get() or os.environ.get("RETORT_CLUSTER", "")
    if name not in BUILT:
        raise Elsewhere(f"its record names a launcher {name!r}, of which there is none")
    return _on_site(name, cluster) if cluster else find(name)


@cache
def _on_site(name: str, cluster: str) -> Launcher:
    """One for each cluster file: launchers remember for some seconds what they have heard."""
    from jobs.cluster import load

    return find(name).at(load(cluster))


def automatic() -> tuple[str, str]:
    """The launcher that fits this machine, and why."""
    from jobs.ray.api import reachable
    from jobs.slurm.queue import answers

    if answers():
        return "slurm", "SLURM answers here"
    if os.environ.get("RAY_ADDRESS"):
        return "ray", "RAY_ADDRESS is set"
    if reachable():
        return "ray", "there is a Kubernetes context"
    return "local", "no SLURM answers here, RAY_ADDRESS is not set and there is no Kubernetes context"
