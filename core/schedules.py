"""Schedules as pure functions of the optimiser step, so that nothing has to be stored to resume one."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, base: float, final: float, steps: int, warmup: int = 0) -> float:
    """Linear warm-up from 0, then a cosine from `base` towards `final` (UNIC, section 7 of its notes).

    The warm-up is linspace(0, base, warmup): its last step is already at `base`, and so is the first cosine step. The
    cosine divides by steps - warmup, so the last step stays just short of `final`, which holds from `steps` on.
    """
    if step >= steps:
        return final
    if step < warmup:
        return base * step / (warmup - 1) if warmup > 1 else 0.0
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
