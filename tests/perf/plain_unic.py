"""UNIC's ladder and loss as the formulas read: one MLP per teacher, token kind and block, one loop over the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.losses import drop_teachers
from core.methods.unic import unic_loss
from core.models.heads import KINDS, Ladder

DEPTH, DIM, BATCH, PATCHES = 4, 192, 16, 64  # the release has 128 images and 12 blocks of 768
TEACHERS = {"a": 192, "b": 256, "c": 192, "d": 128}
Calls = tuple[Callable[[], object], Callable[[], object]]


def plain_ladder(ladder: Ladder, taps: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for teacher in TEACHERS:
        out[teacher] = {}
        for kind in KINDS:
            tokens = [tap[:, 0] if kind == "cls" else tap[:, 1:] for tap in taps[1:]]
            parts = zip(ladder._projectors(teacher, kind), tokens, strict=True)
            out[teacher][kind] = sum(projector.layers(x) for projector, x in parts)  # type: ignore[assignment]
    return out


def plain_loss(student: dict[str, dict[str, Tensor]], targets: dict[str, dict[str, Tensor]], u_TB: Tensor) -> Tensor:
    rows = []
    for name in sorted(targets):
        kinds = []
        for kind in KINDS:
            pred, target = student[name][kind], targets[name][kind]
            value = 0.5 * (1 - F.cosine_similarity(pred, target, dim=-1)) + 0.5 * F.smooth_l1_loss(
                pred, target, reduction="none"
            ).mean(-1)
            kinds.append(value.mean(-1) if kind == "patch" else value)
        rows.append((kinds[0] + kinds[1]) / 2)
    return plain_drop(torch.stack(rows), u_TB)


def plain_drop(loss_TB: Tensor, u_TB: Tensor) -> Tensor:
    """Image by image: the teacher imitated worst stays, the others by chance."""
    coefficients = torch.zeros_like(loss_TB)
    for image in range(loss_TB.shape[1]):
        worst = int(loss_TB[:, image].argmax())
        for teacher in range(loss_TB.shape[0]):
            coefficients[teacher, image] = float(teacher == worst or bool(u_TB[teacher, image] > 0.5))
    return (loss_TB * coefficients).sum() / coefficients.sum()


def pairs() -> dict[str, Calls]:
    torch.manual_seed(0)
    ladder = Ladder(DIM, TEACHERS, range(DEPTH), DEPTH, 192, 768)
    taps = [torch.randn(BATCH, 1 + PATCHES, DIM, requires_grad=True) for _ in range(DEPTH + 1)]
    targets = {t: {"cls": torch.randn(BATCH, d), "patch": torch.randn(BATCH, PATCHES, d)} for t, d in TEACHERS.items()}
    u_TB = torch.rand(len(TEACHERS), BATCH)
    many, draws = torch.rand(len(TEACHERS), 256, requires_grad=True), torch.rand(len(TEACHERS), 256)

    def product() -> None:
        unic_loss(ladder(taps), targets, u_TB, 0.5, 0.5, 0.5)[0].backward()

    def plain() -> None:
        plain_loss(plain_ladder(ladder, taps), targets, u_TB).backward()

    return {
        "ladder and loss": (product, plain),
        "teacher dropping": (
            lambda: drop_teachers(many, draws, 0.5)[0].backward(),
            lambda: plain_drop(many, draws).backward(),
        ),
    }
