"""Initial weights of Feature-Distillation's students, where the release departs from timm (section 3 of its notes)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

STD = 0.02
POST_NORM = 1e-5  # initial weight of SwinV2's norms behind attention and MLP: blocks begin as identities
HEAD_SCALE = 0.001


@torch.no_grad()
def init_student(model: nn.Module, bound: float = STD) -> bool:
    """Initialise a Beit or SwinTransformerV2 as released, from torch's generator; False: another network, left alone.

    bound: the normal draws of a Beit are cut off there. STD in distillation (one sigma), 2 (no effect) otherwise.
    """
    if isinstance(model, Beit):
        _draw(model.modules(), bound)
        for tokens in (model.cls_token if model.num_prefix_tokens else None, model.pos_embed):
            if tokens is not None:
                _normal(tokens, bound)
        rescale_branches([*model.blocks])
    elif isinstance(model, SwinTransformerV2):
        _draw(model.modules(), 2.0)
        blocks = [module for module in model.modules() if isinstance(module, SwinTransformerV2Block)]
        for block in blocks:
            nn.init.constant_(block.get_parameter("norm1.weight"), POST_NORM)
            nn.init.constant_(block.get_parameter("norm2.weight"), POST_NORM)
        rescale_branches(blocks)
    else:
        return False
    return True


@torch.no_grad()
def init_head(head: nn.Linear) -> None:
    """A classifier that starts near zero: weights 0.02 * 0.001, bias 0."""
    _normal(head.weight, 2.0)
    head.weight.mul_(HEAD_SCALE)
    nn.init.zeros_(head.bias)


def _draw(modules: Iterable[nn.Module], bound: float) -> None:
    for module in modules:
        if isinstance(module, nn.Linear | nn.Conv2d):
            _normal(module.weight, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _normal(tensor: Tensor, bound: float) -> None:
    nn.init.trunc_normal_(tensor, std=STD, a=-bound, b=bound)


def rescale_branches(blocks: Sequence[nn.Module]) -> None:
    """Residual branches of block i (from 1, over all stages) end in weights divided by sqrt(2 i)."""
    for number, block in enumerate(blocks, start=1):
        for weight in (block.get_parameter("attn.proj.weight"), block.get_parameter("mlp.fc2.weight")):
            weight.div_(math.sqrt(2.0 * number))
