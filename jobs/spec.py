"""What a submission is: its run id, the code and the packages it runs with."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import UserError

if TYPE_CHECKING:
    from core.recipe import Recipe, Teacher
    from jobs.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent


def imports() -> dict[str, str]:
    """Variables by which a Python that is started finds this code first, and nothing in the folder it works in."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # an empty one would stand for that folder
    search = dict.fromkeys([str(REPOSITORY), *filter(None, others)])
    return {"PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"}


@dataclass(frozen=True)
class Code:
    commit: str  # "unknown" outside of git and of an image
    dirty: bool

    def __str__(self) -> str:
        return f"{self.commit}-dirty" if self.dirty else self.commit


def run_id(recipe: Recipe) -> str:
    """Recipe name and ten hex digits of what the result depends on."""
    from core.config import fingerprint

    return f"{recipe.name}-{fingerprint(recipe)[:10]}"


def fresh_id(root: str, base: str) -> str:
    """The first of BASE, BASE-2, BASE-3 ... that no run has."""
    from jobs.record import Run

    number, name = 1, base
    while Run(root, name).exists():
        number += 1
        name = f"{base}-{number}"
    return name


def code(repository: Path = REPOSITORY) -> Code:
    commit = _git(repository, "rev-parse", "HEAD")
    if commit is None:  # in an image, whose build has left word
        built, _, dirty = os.environ.get("RETORT_COMMIT", "unknown").partition("-")
        return Code(built, bool(dirty))
    return Code(commit.strip(), bool(_git(repository, "status", "--porcelain")))


def difference(wanted: str) -> str:
    """What to say where this is not the code of the commit that was submitted; nothing where that cannot be told."""
    here = code().commit
    if here == wanted or not wanted or "unknown" in (here, wanted):
        return ""
    return f"this is the code of {here}; what it works on was submitted with {wanted}"


def require_clean(current: Code, allow_dirty: bool) -> None:
    """For launchers whose nodes do not see this working tree.  Raises UserError."""
    if current.dirty and not allow_dirty:
        raise UserError("the working tree has uncommitted changes: commit them, or submit as it is with DIRTY=1")


def packages() -> dict[str, str]:
    """Installed distributions and their versions."""
    found = {d.name: d.version for d in metadata.distributions()}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def record(run: str, recipe: Recipe, root: str, settings: Settings, current: Code) -> dict[str, Any]:
    """Content of record.json: what does not change over the life of a run."""
    from core.config import fingerprint
    from core.models.locate import digest

    def described(teacher: Teacher) -> dict[str, str]:
        known = teacher.weights != "random"
        sha = digest(teacher.weights, teacher.name, root) if known else ""
        return {"weights": teacher.weights, "sha256": sha, "licence": teacher.licence}

    return {
        "id": run,
        "recipe": recipe.name,
        "fingerprint": fingerprint(recipe),
        "profile": settings.profile,
        "dotlist": list(settings.set),
        "commit": current.commit,
        "dirty": current.dirty,
        "packages": packages(),
        "created": time.time(),
        "teachers": {name: described(teacher) for name, teacher in recipe.teachers.items()},
    }


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
