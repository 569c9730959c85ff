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


def unshifted_cosine(step: int, *, base: float, final: float, start: float, steps: int, warmup: float = 0) -> float:
    """Linear warm-up from `start`, then a cosine over all `steps` (DIME-FM, section 7 of its notes).

    The cosine counts from step 0, not from the end of the warm-up, so that `base` is never quite reached.
    """
    if step < warmup:
        return start + step * (base - start) / warmup
    if step >= steps:
        return final
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * step / steps))


def late_epoch(epoch: int, resumed_at: int | None = None) -> int:
    """Epoch whose value a schedule has in `epoch` when it is stepped after each epoch with that epoch's own index.

    So 0 and 1 share a value, and the last one is never used (Proteus, section 7 of its notes). A released run that was
    resumed at an epoch stepped once too early and used that epoch's own value in it.
    """
    return epoch if epoch == resumed_at else max(epoch - 1, 0)


def warmup_linear(step: int, *, base: float, steps: int, warmup: int, start: float = 1e-6) -> float:
    """Linear warm-up from base * start, then linear to 0: dense prediction (Proteus, sections 9.3 and 9.4).

    Both lines reach their end on their last step, `warmup` - 1 and `steps` - 1.
    """
    if step < warmup:
        return base * (start + (1.0 - start) * step / max(warmup - 1, 1))
    return base * max(0.0, 1.0 - (step - warmup) / max(steps - warmup - 1, 1))


def lagged_cosine(last: int, *, base: float, final: float, start: float, steps: int, warmup: int = 0) -> float:
    """Linear warm-up from `start`, then a cosine to `final`, both a step late (Feature-Distillation, section 7).

    The schedule moves after each step with that step's own index. last: the index it moved with before this step, -1
    for the first step, which runs at `start` (at `base` without a warm-up).
    """
    if last < 0:
        return start if warmup else base
    if last < warmup:
        return start + last * (base - start) / warmup
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * min((last - warmup) / (steps - warmup), 1.0)))
