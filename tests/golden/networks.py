"""Networks of the product at the sizes that a case's arrays have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from core.data.pillow import NORMS
from core.models.weights import load_strict, to_timm
from tests.golden.runner import Case


def tensor(array: np.ndarray) -> Tensor:
    """Floats as float64, whatever they are stored as; integers as they are."""
    out = torch.from_numpy(np.array(array))
    return out.double() if out.is_floating_point() else out


def norm_of(case: Case) -> str:
    """The product's name of a case's mean and deviation of pixels."""
    wanted = [*case["mean"], *case["std"]]
    return next(name for name, (mean, std) in NORMS.items() if np.allclose([*mean, *std], wanted, atol=1e-9))


def vit_from(
    case: Case | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    layout: str | None = None,
    heads: int | None = None,
    embed: bool = True,
    reg_tokens: int = 0,
    img_size: int | None = None,
) -> VisionTransformer:
    """timm's VisionTransformer with the shapes of a state dict, which is loaded when it comes from a case.

    Args:
        state: timm state dict to take the shapes from; None: the case's `param.*`, converted by the product.
        heads: attention heads; None: the case's `hp.heads`.
        embed: False for cases that hold the blocks alone.
    """
    if state is None:
        assert case is not None
        state = to_timm({name: tensor(array) for name, array in case.below("param.").items()}, layout)
    model = VisionTransformer(
        num_heads=heads or int(case["hp.heads"]), num_classes=0, reg_tokens=reg_tokens, **_shapes(state, img_size)
    )
    if case is None:
        return model
    for name, own in (("depth", len(model.blocks)), ("patch", model.patch_embed.patch_size[0])):
        stated = int(case.get(f"hp.{name}", own))
        assert stated == own or not embed, f"hp.{name} is {stated}, the weights are of one with {own}"
    model = model.double()
    if embed:
        load_strict(model, state)
    else:
        blocks = {key.removeprefix("blocks."): value for key, value in state.items()}
        model.blocks.load_state_dict(blocks, strict=True)
    return model


def _shapes(state: Mapping[str, Tensor], img_size: int | None) -> dict[str, object]:
    hidden, dim = state["blocks.0.mlp.fc1.weight"].shape
    shapes: dict[str, object] = {
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
    }
    if "pos_embed" not in state:
        return shapes | {"img_size": 4, "patch_size": 4}
    patch, places = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[1]
    side = math.isqrt(places)
    no_embed_class = side * side == places
    return shapes | {"img_size": img_size or side * patch, "patch_size": patch, "no_embed_class": no_embed_class}
