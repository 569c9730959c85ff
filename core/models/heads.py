"""The ladder of expendable projectors between a student's blocks and its teachers (UNIC, arXiv 2408.05088)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["cls", "patch"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LN_EPS = 1e-5


class Projector(nn.Module):
    """Parameters of one two-layer MLP, named as released: layers.0 and layers.2, moved up by one behind a LayerNorm.

    prenorm: a LayerNorm in front.  midnorm: one between the first layer and the GELU.
    """

    def __init__(self, dim: int, hidden: int, out: int, prenorm: bool = False, midnorm: bool = False) -> None:
        super().__init__()
        before = [nn.LayerNorm(dim, eps=LN_EPS)] if prenorm else []
        between = [nn.LayerNorm(hidden, eps=LN_EPS)] if midnorm else []
        self.layers = nn.Sequential(*before, nn.Linear(dim, hidden), *between, nn.GELU(), nn.Linear(hidden, out))
        for layer in (self.first, self.second):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(layer.bias)

    @property
    def first(self) -> nn.Linear:
        return next(layer for layer in self.layers if isinstance(layer, nn.Linear))

    @property
    def second(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])

    @property
    def between(self) -> nn.LayerNorm:
        """The LayerNorm of `midnorm`."""
        return cast(nn.LayerNorm, self.layers[-3])

    def first_weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first layer; the scale and shift of a LayerNorm in front are folded in."""
        weight, bias = self.first.weight, self.first.bias
        norm = self.layers[0]
        if not isinstance(norm, nn.LayerNorm):
            return weight, bias
        return weight * norm.weight, bias + (weight * norm.bias).sum(1)


class Ladder(nn.Module):
    """For every teacher and token kind, the sum over blocks of an MLP of that block's output, before the final norm.

    The parameters are those of the released code, one MLP per heads.{teacher}.{kind}.{block}, so that Adam, weight
    decay and clipping per parameter act as there. They are laid side by side only for the computation: per block one
    product with all teachers' first layers, and per teacher one whose inner axis is all blocks' hidden units.

    Args:
        dim: width of the student.
        teachers: name -> width of the teacher's features; heads are held in sorted order of names.
        blocks: indices of the tapped blocks.
        depth: number of blocks of the student; only block depth-1 has `last_hidden` hidden units, others `hidden`.
        prenorm: a LayerNorm in front of every MLP (off in the released models).
        midnorm: a LayerNorm between its layers (off as well).
    """

    def __init__(
        self,
        dim: int,
        teachers: Mapping[str, int],
        blocks: Sequence[int],
        depth: int,
        hidden: int,
        last_hidden: int,
        prenorm: bool = False,
        midnorm: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.prenorm, self.midnorm = dim, prenorm, midnorm
        self.blocks = sorted(blocks)
        self.widths = {block: last_hidden if block == depth - 1 else hidden for block in self.blocks}
        if not self.blocks or self.blocks[0] < 0 or self.blocks[-1] >= depth:
            raise ValueError(f"ladder blocks must lie in 0..{depth - 1}, got {list(blocks)}")
        self.teachers = {name: teachers[name] for name in sorted(teachers)}
        self.heads = nn.ModuleDict({name: self._teacher_heads(out) for name, out in self.teachers.items()})

    def _teacher_heads(self, out: int) -> nn.ModuleDict:
        return nn.ModuleDict({kind: self._kind_heads(out) for kind in KINDS})

    def _kind_heads(self, out: int) -> nn.ModuleDict:
        options = self.prenorm, self.midnorm
        return nn.ModuleDict({str(b): Projector(self.dim, self.widths[b], out, *options) for b in self.blocks})

    def _projectors(self, teacher: str, kind: Kind) -> list[Projector]:
        """Projectors of a teacher in block order."""
        heads = cast(nn.ModuleDict, cast(nn.ModuleDict, self.heads[teacher])[kind])
        return [cast(Projector, heads[str(block)]) for block in self.blocks]

    def external_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that forward reads without calling the modules that own them (ZeRO-3 has to gather them)."""
        return self.parameters()

    def forward(self, taps: Sequence[Tensor], num_prefix: int = 1) -> dict[str, dict[Kind, Tensor]]:
        """Taps of `vit.forward_taps`, L+1 tensors (B, P+N, D) -> {teacher: {"cls": (B, D_t), "patch": (B, N, D_t)}}.

        Args:
            num_prefix: P, the tokens in front of the patches; the first of them is the class token.
        """
        tokens: dict[Kind, list[Tensor]] = {
            "cls": [taps[block + 1][:, 0] for block in self.blocks],
            "patch": [taps[block + 1][:, num_prefix:] for block in self.blocks],
        }
        by_kind = {kind: self._project(kind, xs) for kind, xs in tokens.items()}
        return {name: {kind: by_kind[kind][name] for kind in KINDS} for name in self.teachers}

    def _project(self, kind: Kind, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        projectors = {name: self._projectors(name, kind) for name in self.teachers}
        hidden: dict[str, list[Tensor]] = {name: [] for name in self.teachers}
        for i, x in enumerate(inputs):
            stack = [projectors[name][i].first_weights() for name in self.teachers]
            x = F.layer_norm(x, (self.dim,), eps=LN_EPS) if self.prenorm else x
            h = F.linear(x, torch.cat([w for w, _ in stack]), torch.cat([b for _, b in stack]))
            h = h.view(*h.shape[:-1], len(self.teachers), -1)
            if self.midnorm:
                norms = [projectors[name][i].between for name in self.teachers]
                h = F.layer_norm(h, h.shape[-1:], eps=LN_EPS)
                h = h * torch.stack([norm.weight for norm in norms]) + torch.stack([norm.bias for norm in norms])
            for name, part in zip(self.teachers, F.gelu(h).unbind(-2), strict=True):
                hidden[name].append(part)
        return {name: _second_layers(hidden[name], projectors[name]) for name in self.teachers}

    def flops(self, patches: int) -> int:
        """Floating-point operations (two per multiply-add) of a forward pass for one image with that many patches."""
        pairs = [(out, width) for out in self.teachers.values() for width in self.widths.values()]
        return sum(2 * width * (self.dim + out) for out, width in pairs) * (1 + patches)


def _second_layers(hidden: Sequence[Tensor], projectors: Sequence[Projector]) -> Tensor:
    """Sum over blocks of the second layers, as one product over the concatenated hidden units."""
    weight = torch.cat([p.second.weight for p in projectors], dim=1)
    # Added one by one: through stack().sum() all biases would get views of one gradient, and accumulating micro-batches
    # in place would count it once per block.
    bias: Tensor = projectors[0].second.bias
    for projector in projectors[1:]:
        bias = bias + projector.second.bias
    return F.linear(torch.cat(list(hidden), dim=-1), weight, bias)
