"""Toy runs that several schedulers train, and what they come to when nobody interrupts them."""

from __future__ import annotations

from core.metrics import read_metrics
from core.storage import open_store

RANDOM = "teachers.digits_masked.weights=random teachers.digits_supervised.weights=random"
SMALL = "student.args.depth=2 teachers.digits_masked.args.depth=1 teachers.digits_supervised.args.depth=1"
SHORT = f"train.steps=40 checkpoint.every_steps=20 launch.grace_s=20 {RANDOM} {SMALL}"
LONG = f"train.steps=320 checkpoint.every_steps=20 launch.grace_s=20 {RANDOM} {SMALL}"
SMOKE = ("--profile", "smoke", "--set")


def losses(root: str, name: str) -> dict[int, float]:
    """By step."""
    rows = read_metrics(open_store(f"{root}/runs/{name}"))
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
