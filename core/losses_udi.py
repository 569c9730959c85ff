"""UDI's targets and loss (arXiv 2407.17671), as pure functions of predictions, float32 or wider.

Levels: `cls`, `mixed` (the second class token, which learns a mixture of patch and image predictions), `patch`.
Shapes: 2 views of B images, n small crops, s and s' sampled positions, K outputs. Teacher view i is the other crop of
student view i. Everything before the centre is linear in the outputs of the last layer, so `combine` may be given
bottlenecks and its result be sent through that layer: the same logits from a tenth of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LEVELS = ("cls", "mixed", "patch")
NAMES = {"cls": "cl", "mixed": "mcl", "patch": "pch"}  # in the released logs, behind g_ (global) or l_ (local)
MASS_FLOOR = 1e-5
Rows = dict[str, Tensor]


def warmup_temperature(epoch: int, start: float, final: float, warmup_epochs: int) -> float:
    """Linear over the first epochs, the last of which is at `final` already; constant within an epoch."""
    if epoch >= warmup_epochs:
        return final
    return start + (final - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start


def combine(
    cls: Tensor, patch: Tensor | None, local: Tensor | None, w_patch: Tensor | None, w_local: Tensor | None,
    alpha: float, mixed: bool = True,
) -> Rows:  # fmt: skip
    """Teacher predictions that are needed, from all that there are.

    cls (2, B, D), patch (2, B, s, D), local (n, 2, B, s', D) at the positions of the small crops, with the positions'
    weights w_* (sums of bilinear weights, 1 or 0).

    Returns cls, patch as they are; mixed (2, B, D) and local_mixed (n, 2, B, D), alpha times the mean over positions
    plus 1 - alpha times cls; means (L, D), batch means per level that move the centres.
    """
    rows, means = {"cls": cls}, [cls.flatten(0, 1).mean(0)]
    if patch is not None and w_patch is not None:
        parts = [(patch, w_patch)] + ([(local, w_local)] if local is not None and w_local is not None else [])
        if mixed:
            rows["mixed"] = _mix(cls, patch, w_patch, alpha)
            if local is not None and w_local is not None:
                rows["local_mixed"] = _mix(cls, local, w_local, alpha)
            targets = [rows[name].flatten(0, -2) for name in ("mixed", "local_mixed") if name in rows]
            means.append(torch.cat(targets).mean(0))
        rows["patch"] = patch
        means.append(_weighted_mean(parts))
    return rows | {"means": torch.stack(means)}


def _mix(cls: Tensor, positions: Tensor, weight: Tensor, alpha: float) -> Tensor:
    weight = weight.to(positions.dtype)
    mean = (weight.unsqueeze(-2) @ positions).squeeze(-2) / (weight.sum(-1, keepdim=True) + MASS_FLOOR)
    return alpha * mean + (1.0 - alpha) * cls


def _weighted_mean(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Over all positions of all parts (..., s, D) by their weights (..., s); equal weights where there is no match."""
    weights = torch.cat([weight.flatten() for _, weight in parts]).to(parts[0][0].dtype)
    weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    sizes = [weight.numel() for _, weight in parts]
    sums = [w @ x.flatten(0, -2) for w, (x, _) in zip(torch.split(weights, sizes), parts, strict=True)]
    return torch.stack(sums).sum(0) / weights.sum()


def project(rows: Rows, last_layer: Callable[[Tensor], Tensor]) -> Rows:
    """All rows (..., D) through the last layer in one product: (..., K)."""
    flat = {name: x.flatten(0, -2) for name, x in rows.items()}
    parts = torch.split(last_layer(torch.cat(list(flat.values()))), [len(x) for x in flat.values()])
    return {name: part.view(*rows[name].shape[:-1], -1) for name, part in zip(rows, parts, strict=True)}


def cross_entropy(p: Tensor, z: Tensor, temperature: float) -> Tensor:
    """-sum_k p_k log softmax(z / temperature)_k for p that sums to 1: (..., K), (..., K) -> (...)."""
    return torch.logsumexp(z / temperature, dim=-1) - (p * z).sum(-1) / temperature


def udi_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], valid: Tensor | None, center_LK: Tensor, *,
    temperature: float, student_temperature: float, weights: Sequence[float],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss over the levels that the teacher has (section 5 of the method's notes).

    student: cls, mixed (2, B, K), patch (2, B, s, K), local_cls, local_mixed (n, B, K).  teacher: logits of `combine`.
    valid: (2, B, s) 1 where a position of the student has a match.  weights, center_LK: one per level, in order.

    Every ordered pair of views of an image weighs the same; the targets of a small crop are averaged first, in which
    cross-entropy is linear.  Returns the scalar loss and the parts under their released names.
    """
    center = dict(zip([level for level in LEVELS if level in teacher], center_LK.to(teacher["cls"].dtype), strict=True))

    def target(level: str, logits: Tensor) -> Tensor:
        return torch.softmax((logits - center[level]) / temperature, dim=-1)

    report: dict[str, Tensor] = {}
    total = center_LK.new_zeros(())
    for weight, level in zip(weights, center, strict=True):
        p = target(level, teacher[level])
        entropy = cross_entropy(p, student[level], student_temperature)
        if level == "patch":
            assert valid is not None
            mask = valid.to(entropy.dtype)
            loss = report[f"g_{NAMES[level]}"] = (entropy * mask).sum() / mask.sum().clamp(min=1.0)
        else:
            loss = report[f"g_{NAMES[level]}"] = entropy.mean()
            small = student.get(f"local_{level}")
            if small is not None and len(small):
                seen = target(level, teacher["local_mixed"]) if level == "mixed" else p.unsqueeze(0)
                own = cross_entropy(seen.mean(1), small, student_temperature).mean()
                report[f"l_{NAMES[level]}"] = own
                loss = (loss + len(small) * own) / (1 + len(small))
        total = total + weight * loss
    return total, {name: value.detach() for name, value in report.items()}
