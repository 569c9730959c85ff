"""Plain ViTs: DINO, iBOT, DeiT-III, DINOv2, SynCLR, and the released students of UNIC, Proteus and UDI."""

from __future__ import annotations

import re

from core.models.layouts import clip
from core.models.layouts.keys import State, below, has, rename, tower, without

CHUNKED = re.compile(r"(?:encoder\.)?blocks\.\d+\.\d+\.")
DINO_BESIDE = r"(dino_|ibot_|linear_)?head\."
PROTEUS_BESIDE = r"teacher\.|token_head\.|fea_head\.|patch_head\."
UDI_BESIDE = r"backbone\.(attn|norm1)\.|attn\.|norm1\.|head\."


def is_dinov2(state: State) -> bool:
    named = {"register_tokens", "blocks.0.mlp.w12.weight", "mask_token"} & state.keys()
    return bool(named) or any(CHUNKED.match(key) for key in state)


def from_dinov2(state: State) -> State:
    """Block chunks blocks.{chunk}.{i} (i counts over all chunks), SwiGLU names, registers without positions."""
    rules = [(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")]
    out = rename(without(state, "^mask_token$"), rules)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def from_dino(state: State) -> State:
    """DINO family: in a training checkpoint the network is below `backbone.`, beside its heads."""
    inside = any(key.startswith("backbone.") for key in state)
    backbone = tower("backbone.", state, DINO_BESIDE) if inside else state
    return from_dinov2(backbone) if is_dinov2(backbone) else without(backbone, "^masked_embed$")


def from_deit3(state: State) -> State:
    return rename(state, [(r"\.gamma_([12])$", r".ls\1.gamma")])


def is_deit3(state: State) -> bool:
    return has("blocks.0.gamma_1", "blocks.0.attn.qkv.bias")(state)  # BEiT's attention has biases of its own


def from_synclr(state: State) -> State:
    """The tower below `visual.`, beside heads of the contrastive stage; a mask token takes no part."""
    return without(below("visual.", state) or dict(state), "^mask_token$")


def is_unic(state: State) -> bool:
    return any(key.startswith("encoder.blocks.") for key in state)


def from_unic(state: State) -> State:
    """The encoder alone; the ladder `lp.*` is expendable."""
    return from_dinov2(tower("encoder.", state, r"lp\."))


def from_proteus(state: State) -> State:
    """The student's backbone, a DINOv2-style ViT or a CLIP tower, out of the pair with its teacher and heads."""
    backbone = tower("student.backbone.", state, PROTEUS_BESIDE)
    return clip.from_clip(backbone) if any(key.startswith("conv1.") for key in backbone) else from_dinov2(backbone)


def is_udi(state: State) -> bool:
    token = state.get("cls_token")
    two = token is not None and token.ndim == 3 and token.shape[1] == 2
    return two or "backbone.backbone.cls_token" in state or has("backbone.cls_token", "attn.qkv.weight")(state)


def from_udi(state: State) -> State:
    """ViT with class tokens cls and cls+, which is timm's first register; each has its own position.

    Stripped copies with one class token or none, and 197 or 196 positions, keep what they have.
    """
    while any(key.startswith("backbone.") for key in state):
        state = tower("backbone.", state, UDI_BESIDE)
    out = without(state, r"^attn\.|^norm1\.|^head\.")
    token = out.get("cls_token")
    if token is not None and token.shape[1] == 2:
        out["cls_token"], out["reg_token"] = token[:, :1], token[:, 1:]
    return out
