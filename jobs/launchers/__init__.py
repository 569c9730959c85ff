"""Launchers: the same verbs over a machine and over schedulers. Each is one file, found by its name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import UserError, nearest
from jobs.placement import Placement

if TYPE_CHECKING:
    from core.config import Recipe
    from jobs.cluster import Cluster
    from jobs.record import Run

BUILT = ("local", "slurm")
PLANNED = ("ray",)


@dataclass(frozen=True)
class Look:
    """What a launcher sees of a run's newest attempt from this machine."""

    alive: bool | None  # somebody works on it or will; None: that cannot be told from here
    text: str = ""  # in the scheduler's words


@dataclass(frozen=True)
class Order:
    """One attempt to start."""

    run: Run
    recipe: Recipe
    attempt: int
    info: dict[str, Any]  # for the transition to `queued`
    after: tuple[str, ...] = field(default=())  # verbs to run on the run once it has succeeded


class Launcher(ABC):
    """Starts the ranks of a run somewhere and can reach them again through what it wrote into the run's record."""

    name: str
    shares_tree: bool  # ranks see this working tree and this machine's file:// stores
    queues: bool  # takes many runs at once, and jobs that wait for others

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

    def render(self, run: Run, recipe: Recipe, placement: Placement) -> Path:
        """Write what would be submitted into a file, to look at or to submit by hand.  Raises UserError, NotReady."""
        raise UserError(f"LAUNCHER: {self.name} submits nothing that could be rendered; use LAUNCHER=slurm")

    @abstractmethod
    def cancel(self, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ask the ranks behind a transition's info to save and end; False when they cannot be reached from here.

        at_once: they have been asked before and are still there.
        """

    @abstractmethod
    def look(self, info: Mapping[str, Any]) -> Look:
        """Whether anybody still works on the run."""

    def logs(self, info: Mapping[str, Any], attempt: int) -> Path | None:
        """Folder with the logs of an attempt, where it can be seen from here."""
        folder = Path(info.get("logs", "")) / f"attempt-{attempt:04d}"
        return folder if folder.is_dir() else None


def find(name: str) -> Launcher:
    """The launcher of this name.  Raises UserError."""
    if name in PLANNED:
        raise UserError(f"launcher {name} is not built yet; use LAUNCHER=local or LAUNCHER=slurm")
    if name not in BUILT:
        known = ("auto", *BUILT, *PLANNED)
        raise UserError(f"LAUNCHER: {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
    launcher: Launcher = importlib.import_module(f"jobs.launchers.{name}").LAUNCHER
    return launcher


def automatic() -> tuple[str, str]:
    """The launcher that fits this machine, and why."""
    from jobs.slurm.queue import answers

    return ("slurm", "SLURM answers here") if answers() else ("local", "no SLURM answers here")
