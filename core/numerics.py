"""Changes of what an unchanged recipe computes: a run that was begun before one does not go on with it unnoticed.

A recipe remembers after which of them it was resolved, `Recipe.numerics`. Those that bear on a recipe are part of its
fingerprint, so that checkpoints and run ids of the two computations differ; for all other recipes nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.merge import ConfigError
from core.recipe import Recipe


@dataclass(frozen=True)
class Change:
    date: str
    what: str  # is computed now, and what was before
    bears_on: Callable[[Recipe], bool]


def _warms_up_for_part_of_an_epoch(recipe: Recipe) -> bool:
    stages = [recipe.stage(name) for name in recipe.stage_names()]
    return any(s.warmup_steps < 0 and not float(s.warmup_epochs).is_integer() for s in stages)


# Parts of the names of timm's networks that have stochastic depth of their own where nothing is said.
OWN_DROP_PATH = ("swin", "focalnet", "tiny_vit", "fasternet", "nest_", "nextvit", "efficientformerv2", "cpubone")


def _left_timm_s_drop_path(recipe: Recipe) -> bool:
    students = [recipe.at(name).student for name in recipe.stage_names()]
    unsaid = [s.name for s in students if not s.drop_path and "drop_path_rate" not in s.args]
    return any(part in name for name in unsaid for part in OWN_DROP_PATH)


# In the order in which they were made; one is never taken out, as its place is what recipes remember.
CHANGES = (
    Change("2026-12-01", "a warm-up of parts of an epoch is rounded down to steps; before, to the nearest step",
           _warms_up_for_part_of_an_epoch),
    Change("2026-12-01", "student.drop_path: 0 leaves out no path of any network; before, it left timm's own rate, "
           "0.1 in a Swin", _left_timm_s_drop_path),
)  # fmt: skip
CURRENT = len(CHANGES)


def made_before(recipe: Recipe) -> list[str]:
    """Changes that bear on a recipe and that it was resolved after, a line each."""
    return [_line(change) for change in CHANGES[: recipe.numerics] if change.bears_on(recipe)]


def made_since(recipe: Recipe) -> list[str]:
    """Changes that bear on a recipe and were made since it was resolved, a line each."""
    return [_line(change) for change in CHANGES[recipe.numerics :] if change.bears_on(recipe)]


def require_none_since(recipe: Recipe) -> None:
    """Raises ConfigError, with the changes, for a recipe that this Retort computes otherwise than the one before it."""
    if lines := made_since(recipe):
        raise ConfigError(
            "\n  ".join(["the run was begun before Retort changed what its recipe computes:", *lines])
            + "\nFinish it with the Retort that began it, submit its recipe as a run of its own, or go on from its "
            "checkpoints all the same: make resume with FORCE=1"
        )


def _line(change: Change) -> str:
    return f"{change.date}: {change.what}"
