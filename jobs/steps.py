"""What to type next: commands that work as they are printed."""

from __future__ import annotations

import shlex

from jobs.errors import JobError
from jobs.settings import Settings

kept: dict[str, str] = {}  # where what a store holds can be found once this process has ended, and the store with it


def steps(root: str, run: str, *verbs: str) -> str:
    """`make VERB RUN=...; ...`, of a run in the store `root`."""
    return "; ".join(f"make {verb} RUN={run}{elsewhere(root)}" for verb in verbs)


def elsewhere(root: str) -> str:
    """` STORE=...` where a command without it would look in another store."""
    root = kept.get(root, root)
    return "" if root == _default() else f" STORE={shlex.quote(root)}"


def _default() -> str:
    from core.merge import ConfigError

    try:
        return Settings().root()
    except (JobError, ConfigError):  # what the environment says is no store: one must be named anyway
        return ""
