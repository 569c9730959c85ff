"""DINOv2's linear probe: a grid of classifiers over inputs and learning rates, trained side by side on one backbone.

Proteus, section 9.1 of its notes. Inputs are made of the last blocks' tokens, each after the final norm; all
classifiers of one input are one product. The data order is `core.data.sharded`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCKS, POOLED = (1, 4), (False, True)
RATES = tuple(float(f"{digit}e{power}") for power in range(-5, -1) for digit in (1, 2, 5)) + (0.1,)
LR_BATCH = 256  # rates are given for this many samples a step
MOMENTUM, WEIGHT_STD = 0.9, 0.01


def probe_input(cls_LBD: Sequence[Tensor], patch_BND: Tensor, blocks: int, pooled: bool) -> Tensor:
    """Class tokens of the last `blocks` blocks side by side, and the mean of the last block's patches if `pooled`.

    cls_LBD: of at least that many blocks, in their order, (B, D) each.  Returns (B, (blocks + pooled) D) in float32 or
    wider.
    """
    parts = [*cls_LBD[len(cls_LBD) - blocks :], *([patch_BND.mean(1)] if pooled else [])]
    out = torch.cat(parts, -1)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def probe_lr(step: int, base: float, steps: int) -> float:
    """Cosine from `base` to 0, every step."""
    return 0.5 * base * (1.0 + math.cos(math.pi * step / steps))


def probe_name(blocks: int, pooled: bool, lr: float) -> str:
    """As released, for example classifier_4_blocks_avgpool_True_lr_0_01000."""
    return f"classifier_{blocks}_blocks_avgpool_{pooled}_lr_{lr:.5f}".replace(".", "_")


@dataclass
class Group:
    """Classifiers that read the same input: weights (G, C, F), biases (G, C), their speeds, learning rates (G,)."""

    blocks: int
    pooled: bool
    weight: Tensor
    bias: Tensor
    lr: list[float]
    speed: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.speed = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x_BF: Tensor) -> Tensor:
        """(B, F) -> (G, B, C)."""
        return torch.einsum("bf,gcf->gbc", x_BF, self.weight) + self.bias.unsqueeze(1)


class ProbeGrid:
    """All classifiers of a search, by SGD with momentum and without weight decay on the sum of their losses.

    Args:
        width: of the backbone.
        rates: base learning rates, scaled here by batch / 256; batch: samples of a step on all ranks.
        steps: of the whole training.
    """

    def __init__(
        self, width: int, classes: int, batch: int, steps: int, *, generator: torch.Generator,
        rates: Sequence[float] = RATES, blocks: Sequence[int] = BLOCKS, pooled: Sequence[bool] = POOLED,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.steps, self.taken = steps, 0
        lrs = [rate * batch / LR_BATCH for rate in rates]
        self.groups = []
        for count in blocks:
            for pool in pooled:
                shape = len(lrs), classes, (count + pool) * width
                weight = torch.randn(shape, generator=generator, dtype=dtype) * WEIGHT_STD
                self.groups.append(Group(count, pool, weight, weight.new_zeros(shape[:2]), lrs))

    def names(self) -> list[str]:
        return [probe_name(group.blocks, group.pooled, lr) for group in self.groups for lr in group.lr]

    def lr_now(self) -> list[float]:
        """Learning rates of the next step, in the order of `names`."""
        return [probe_lr(self.taken, lr, self.steps) for group in self.groups for lr in group.lr]

    @torch.no_grad()
    def step(self, cls_LBD: Sequence[Tensor], patch_BND: Tensor, labels_B: Tensor) -> Tensor:
        """One optimiser step of every classifier; their losses before it, in the order of `names`."""
        losses = []
        for group in self.groups:
            x_BF = probe_input(cls_LBD, patch_BND, group.blocks, group.pooled).to(group.weight.dtype)
            log_GBC = group.logits(x_BF).log_softmax(-1)
            wanted_BC = torch.zeros_like(log_GBC[0]).scatter_(1, labels_B.unsqueeze(1), 1.0)
            losses.append(-(log_GBC * wanted_BC).sum(-1).mean(-1))
            error_GBC = (log_GBC.exp() - wanted_BC) / len(labels_B)
            slopes = torch.einsum("gbc,bf->gcf", error_GBC, x_BF), error_GBC.sum(1)
            rate_G = x_BF.new_tensor([probe_lr(self.taken, lr, self.steps) for lr in group.lr])
            for values, speed, slope in zip((group.weight, group.bias), group.speed, slopes, strict=True):
                speed.mul_(MOMENTUM).add_(slope)
                values.sub_(rate_G.view(-1, *[1] * (values.ndim - 1)) * speed)
        self.taken += 1
        return torch.cat(losses)
