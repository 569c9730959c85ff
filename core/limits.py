"""What values the fields of a recipe may have, each by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

from core.merge import ConfigError, nearest

CHOICES = {
    "train.precision": ("bf16", "fp32"), "zero.stage": (0, 1, 2, 3), "launch.device": ("auto", "cpu", "cuda"),
    "teachers.*.cls": ("token", "pooled", "projected"), "teachers.*.normalize": ("student", "own"),
    "data.pixels": ("exact", "fast"), "teachers.*.positions": ("offset", "size", "antialias"),
    "features": ("off", "auto", "require"), "data.codec": ("fp32", "bf16", "fp16", "fp8", "int8"),
}  # fmt: skip
POSITIVE = ("train.img_size", "train.batch", "train.micro_batch", "train.max_bad_losses", "data.block",
            "data.classes", "data.share", "data.repeats", "data.weights",
            "loader.prefetch", "loader.cache_gb", "launch.max_attempts", "checkpoint.every_steps", "checkpoint.keep",
            "checkpoint.pending",
            "log.every_steps", "evaluate.seeds", "evaluate.students")  # fmt: skip
NOT_NEGATIVE = ("train.epochs", "train.steps", "train.lr", "train.min_lr", "train.lr_batch", "train.weight_decay",
                "train.warmup_epochs", "train.betas", "train.eps", "train.clip", "launch.ranks",
                "launch.min_ranks", "launch.gather_s", "launch.threads", "loader.workers", "log.flush_s", "seed",
                "train.explode", "train.rewinds", "launch.backoff_s", "launch.deadline_h",
                "launch.time_limit_min", "launch.grace_s", "launch.hang_s",
                "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.patience_s",
                "student.drop_path", "data.max_bad_share", "loader.ahead",
                "data.samples", "data.views")  # fmt: skip
AT_MOST = {"data.classes": 1, "data.share": 1}
BELOW = {"train.betas": 1, "student.drop_path": 1, "seed": 2**32}


def check_value(key: str, value: Any, parts: Collection[str]) -> None:
    """Of a field by its dotted key.  parts: groups that a stage may have of its own.  Raises ConfigError."""
    generic = re.sub(rf"^stages\.[^.]+\.({'|'.join(parts)})\.", r"\1.", re.sub(r"^teachers\.[^.]+", "teachers.*", key))
    generic = re.sub(r"^stages\.[^.]+", "train", generic)
    allowed = CHOICES.get(generic)
    if allowed and value not in allowed:
        hint = nearest(str(value), [str(a) for a in allowed])
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}{hint}")
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{key}: {number} is not a finite number")
        if generic in POSITIVE and number <= 0:
            raise ConfigError(f"{key}: must be above 0, got {number}")
        if generic in NOT_NEGATIVE and number < 0:
            raise ConfigError(f"{key}: must not be negative, got {number}")
        if generic in AT_MOST and number > AT_MOST[generic]:
            raise ConfigError(f"{key}: must be at most {AT_MOST[generic]}, got {number}")
        if generic in BELOW and number >= BELOW[generic]:
            raise ConfigError(f"{key}: must be below {BELOW[generic]}, got {number}")
