"""Verbs whose names are promised and that are not built yet."""

from __future__ import annotations

from jobs.errors import UserError
from jobs.settings import Settings


def features(settings: Settings) -> int:
    raise UserError("features is not built yet: teachers compute their outputs while the student learns")


def image(settings: Settings) -> int:
    raise UserError("image is not built yet: runs start from this working tree")
