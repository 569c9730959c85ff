"""UDI's loss written down formula by formula, to time the product against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.losses_udi import Rows, combine, project, udi_loss
from core.models.srs import SampledAttention, dense_maps
from core.models.udi_heads import ProjectionHead

IMAGES, LOCAL, SAMPLED, LOCAL_SAMPLED = 4, 6, 16, 9
DIM, HIDDEN, BOTTLENECK, OUT = 192, 256, 64, 4096
TEMPERATURE, STUDENT_TEMPERATURE, ALPHA = 0.05, 0.1, 0.5


def plain_teacher(head: ProjectionHead, cls: Tensor, patch: Tensor, local: Tensor, w: Tensor, wl: Tensor) -> Rows:
    """Every position through the last layer, then the means over positions."""
    g0, gp, lp = head(cls), head(patch), head(local)

    def mix(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.unsqueeze(-1)
        return ALPHA * (x * weight).sum(-2) / (weight.sum(-2) + 1e-5) + (1 - ALPHA) * g0

    mixed, local_mixed = mix(gp, w), mix(lp, wl)
    positions = torch.cat([(gp * w.unsqueeze(-1)).flatten(0, -2), (lp * wl.unsqueeze(-1)).flatten(0, -2)]).sum(0)
    means = [g0.flatten(0, 1).mean(0), torch.cat([mixed.flatten(0, 1), local_mixed.flatten(0, 2)]).mean(0),
             positions / (w.sum() + wl.sum())]  # fmt: skip
    return {"cls": g0, "mixed": mixed, "patch": gp, "local_mixed": local_mixed, "means": torch.stack(means)}


def plain_loss(student: Rows, teacher: Rows, valid: Tensor, center: Tensor) -> Tensor:
    def ce(p: Tensor, z: Tensor) -> Tensor:
        return -(p * F.log_softmax(z / STUDENT_TEMPERATURE, dim=-1)).sum(-1)

    def target(level: int, logits: Tensor) -> Tensor:
        return F.softmax((logits - center[level]) / TEMPERATURE, dim=-1)

    total = torch.zeros(())
    for level, name in enumerate(("cls", "mixed")):
        large = ce(target(level, teacher[name]), student[name]).mean()
        seen = teacher["cls"].expand(LOCAL, -1, -1, -1) if name == "cls" else teacher["local_mixed"]
        small = ce(target(level, seen), student[f"local_{name}"].unsqueeze(1).expand_as(seen)).mean()
        total = total + (2 * large + 2 * LOCAL * small) / (2 + 2 * LOCAL) / 3
    patch = ce(target(2, teacher["patch"]), student["patch"])
    return total + (patch * valid).sum() / valid.sum() / 3


def plain_attention(module: SampledAttention, x: Tensor, maps: Tensor) -> Tensor:
    """Queries of every map of every image spelt out: (m, B, s, N) -> (m, B, s, D)."""
    heads, width = module.heads, x.shape[-1] // module.heads
    q, k, v = module.qkv(x).view(*x.shape[:2], 3, heads, width).permute(2, 0, 3, 1, 4)
    queries = maps.unsqueeze(2) @ q.unsqueeze(0)
    attention = (queries @ k.transpose(-2, -1).unsqueeze(0) * width**-0.5).softmax(-1)
    mixed = (attention @ v.unsqueeze(0)).transpose(2, 3).flatten(3)
    out: Tensor = module.norm(module.proj(mixed) + maps @ x.unsqueeze(0))
    return out


def pairs() -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """name -> (product, plain), each one forward and backward pass on the same tensors."""
    torch.manual_seed(0)
    head = ProjectionHead(DIM, HIDDEN, BOTTLENECK, OUT, train_gain=True)
    view, w = (2, IMAGES), torch.ones(2, IMAGES, SAMPLED)
    wl = torch.ones(LOCAL, *view, LOCAL_SAMPLED)
    teacher = torch.randn(*view, DIM), torch.randn(*view, SAMPLED, DIM), torch.randn(LOCAL, *view, LOCAL_SAMPLED, DIM)
    center, valid = torch.randn(3, OUT), torch.ones(2, IMAGES, SAMPLED)
    student = {name: torch.randn(*shape, OUT) for name, shape in {
        "cls": view, "mixed": view, "patch": (*view, SAMPLED), "local_cls": (LOCAL, IMAGES),
        "local_mixed": (LOCAL, IMAGES)}.items()}  # fmt: skip

    def product() -> None:
        with torch.no_grad():
            cls, patch, local = (head.bottleneck(x) for x in teacher)
            rows = project(combine(cls, patch, local, w, wl, ALPHA), head.last_layer)
        leaves = {name: x.clone().requires_grad_() for name, x in student.items()}
        loss, _ = udi_loss(leaves, rows, valid, center, temperature=TEMPERATURE,
                           student_temperature=STUDENT_TEMPERATURE, weights=(1 / 3, 1 / 3, 1 / 3))  # fmt: skip
        loss.backward()

    def plain() -> None:
        with torch.no_grad():
            rows = plain_teacher(head, *teacher, w, wl)
        leaves = {name: x.clone().requires_grad_() for name, x in student.items()}
        plain_loss(leaves, rows, valid, center).backward()

    attention, x = SampledAttention(DIM, 3), torch.randn(2 * IMAGES, 196, DIM)
    index = torch.stack([torch.randperm(196)[:4] for _ in range(2 * IMAGES * LOCAL * LOCAL_SAMPLED)])
    maps = dense_maps(index, torch.full(index.shape, 0.25), 196).view(LOCAL, 2 * IMAGES, LOCAL_SAMPLED, 196)
    flat = maps.transpose(0, 1).flatten(1, 2).contiguous()
    return {
        "targets and loss": (product, plain),
        "sampled attention": (
            lambda: attention(x, flat).sum().backward(),
            lambda: plain_attention(attention, x, maps).sum().backward(),
        ),
    }
