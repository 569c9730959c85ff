"""A student that also predicts teacher tokens of patches it cannot see, with an expendable adapter per kind of token.

Proteus (arXiv 2407.10366). Masked copies of samples run beside the unmasked batch through the same blocks, and only
the samples that have a mask are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from core.methods.base import Batch
from core.models.features import BEHIND_TOKENS
from core.models.vit import as_vit, embed_patches, place, run_block

LN_EPS = 1e-5
KINDS = ("patch", "token", "feature")  # heads for masked patches, class token, visible patches


class Adapter(nn.Sequential):
    """LayerNorm and one linear layer from the student's width to the teacher's, with PyTorch's initial weights."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=LN_EPS), nn.Linear(dim, out))

    @staticmethod
    def flops(dim: int, out: int) -> int:
        """Floating-point operations of one token."""
        return 2 * dim * out


class MaskedStudent(nn.Module):
    """Student, mask token and adapters `heads.{teacher}.{kind}`.

    forward: image (B, 3, S, S), and with a patch head the batch's extra tensors `mask` (n, N) bool, `mask_rows` (n,)
    samples that they belong to, `mask_at` (K,) masked positions in n * N -> {teacher: {token (B, D_t),
    feature (B, N, D_t), patch (K, D_t)}}, those kinds that there are heads for.

    Args:
        kinds: heads to make.
        mask_std: deviation of the initial mask token; 0 starts at zeros.
    """

    def __init__(
        self, student: nn.Module, dim: int, teachers: Mapping[str, int], kinds: Sequence[str], mask_std: float = 0.0
    ) -> None:
        super().__init__()
        self.student, self.kinds = as_vit(student), tuple(kind for kind in KINDS if kind in kinds)
        for name, parameter in student.named_parameters():
            if name.startswith(BEHIND_TOKENS):
                parameter.requires_grad_(False)
        if "patch" in self.kinds:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))
            nn.init.normal_(self.mask_token, std=mask_std)
        self.heads = nn.ModuleDict(
            {name: nn.ModuleDict({kind: Adapter(dim, teachers[name]) for kind in self.kinds}) for name in teachers}
        )

    def external_parameters(self) -> list[nn.Parameter]:
        """Tokens and position table, read without calling the student's own forward."""
        return list(self.student.parameters(recurse=False))

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        tokens = self.tokens(batch)
        heads = {name: cast(nn.ModuleDict, head) for name, head in self.heads.items()}
        return {name: {kind: head[kind](tokens[kind]) for kind in self.kinds} for name, head in heads.items()}

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """The student's tokens after its final norm, which is taken of those alone that a head reads."""
        vit = self.student
        patches, grid = embed_patches(vit, batch.views["image"])
        images, prefix = len(patches), vit.num_prefix_tokens
        x = self.run(torch.cat([patches, self.hide(patches, batch)]) if "patch" in self.kinds else patches, grid)
        out: dict[str, Tensor] = {}
        if "token" in self.kinds:
            seen = vit.norm(x[:images] if "feature" in self.kinds else x[:images, :1])
            out |= {"token": seen[:, 0], "feature": seen[:, prefix:]}
        if "patch" in self.kinds:
            masked = x[images:, prefix:].flatten(0, 1)
            out["patch"] = vit.norm(masked.index_select(0, batch.extra["mask_at"]))
        return out

    def run(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, N, D) -> all tokens after the last block (B, P+N, D), before the final norm."""
        x = place(self.student, x, grid)
        for block in self.student.blocks:
            x = run_block(self.student, block, x)
        return x

    def hide(self, patches: Tensor, batch: Batch) -> Tensor:
        """Patch tokens of the masked samples with the mask token where they are hidden; positions are added later."""
        own = patches.index_select(0, batch.extra["mask_rows"])
        return torch.where(batch.extra["mask"].unsqueeze(-1), self.mask_token.to(own.dtype), own)
