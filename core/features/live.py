"""A teacher that computes its outputs from the images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.base import Batch, Features
from core.models.teachers import FrozenTeacher


@dataclass(frozen=True)
class Live:
    """A teacher that sees the images."""

    teacher: FrozenTeacher
    view: str

    def __call__(self, batch: Batch) -> Features:
        found: Features = self.teacher(batch.views[self.view])
        return found
