"""Launchers: the same verbs over a machine and over schedulers. Each is one file, found by its name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import UserError, nearest
from jobs.placement import Placement
from jobs.record import Run

if TYPE_CHECKING:
    from core.config import Recipe

BUILT = ("local",)
PLANNED = ("ray", "slurm")


class Launcher(ABC):
    """Starts the ranks of a run somewhere and can reach them again through what it wrote into the run's record."""

    name: str
    shares_tree: bool  # ranks see this working tree and this machine's file:// stores

    @abstractmethod
    def submit(self, run: Run, recipe: Recipe, attempt: int, placement: Placement, info: dict[str, Any]) -> None:
        """Move the run to `queued` for this attempt, write down its recipe and start it.

        Raises IllegalMove, having changed and started nothing, when somebody else was first.
        """

    @abstractmethod
    def cancel(self, info: Mapping[str, Any]) -> bool:
        """Ask the ranks behind a transition's info to save and end; False when they cannot be reached from here."""

    @abstractmethod
    def alive(self, info: Mapping[str, Any]) -> bool | None:
        """Whether anybody still works on the run; None when that cannot be told from here."""

    @abstractmethod
    def logs(self, info: Mapping[str, Any], attempt: int) -> Path | None:
        """Folder with the logs of an attempt, where it can be seen from here."""


def find(name: str) -> Launcher:
    """The launcher of this name.  Raises UserError."""
    name = "local" if name == "auto" else name
    if name in PLANNED:
        raise UserError(f"launcher {name} is not built yet; use LAUNCHER=local")
    if name not in BUILT:
        known = ("auto", *BUILT, *PLANNED)
        raise UserError(f"LAUNCHER: {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
    launcher: Launcher = importlib.import_module(f"jobs.launchers.{name}").LAUNCHER
    return launcher
