"""CLIP's visual towers (OpenAI, OpenCLIP, MetaCLIP) and the released students of DIME-FM."""

from __future__ import annotations

from core.models.layouts.keys import State, rename, tower, without
from core.models.layouts.windowed import from_swin

# The text tower, beside the visual one; upstream files of OpenAI also hold three sizes.
TEXT = (
    r"transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection$|text\.|logit_(scale|bias)$|"
    r"attn_mask$|input_resolution$|context_length$|vocab_size$"
)
DIME_BESIDE = rf"{TEXT}|(image|vision)_projection$|lang_(encoder\.|projection$)|text_encoder\."
RULES = [
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def is_clip(state: State) -> bool:
    return "visual.conv1.weight" in state or "conv1.weight" in state and "class_embedding" in state


def from_clip(state: State) -> State:
    """A visual tower, bare or beside its text tower; the projection becomes a head without bias."""
    whole = any(key.startswith("visual.") for key in state)
    out = rename(without(tower("visual.", state, TEXT) if whole else state, "^mask_token$"), RULES)
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in out:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    if "head.weight" in out:
        out["head.weight"] = out["head.weight"].T.contiguous()
    return out


def is_dime_fm(state: State) -> bool:
    return bool({"image_projection", "vision_projection"} & state.keys()) or any(
        key.startswith("image_encoder.") for key in state
    )


def from_dime_fm(state: State) -> State:
    """A student of DIME-FM: CLIP's ViT or a Swin, and its projection, which lies beside the tower."""
    prefix = "visual." if any(key.startswith("visual.") for key in state) else "image_encoder."
    out = tower(prefix, state, DIME_BESIDE)
    swin = any(key.startswith("layers.") for key in out)
    out = from_swin(out) if swin else from_clip(out)
    for key in ("image_projection", "vision_projection"):
        if key in state:
            out["head.fc.weight" if swin else "head.weight"] = state[key].T.contiguous()
    return out
