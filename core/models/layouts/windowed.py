"""Networks with relative positions: BEiT, Swin v1 and v2, EsViT's Swin, and the released students of FD."""

from __future__ import annotations

import re

from core.models.layouts.keys import State, any_starts, below, rename, tower, without

BUFFERS = r"relative_position_index$|relative_coords_table$|attn_mask$"  # computed anew, not weights
FD_BESIDE = r"decoder\.|feature_model\."


def is_beit(state: State) -> bool:
    return "blocks.0.attn.q_bias" in state


def from_beit(state: State) -> State:
    """Without biases of keys: they add the same to all scores of a query, which softmax takes away again."""
    return without(state, rf"{BUFFERS}|\.attn\.k_bias$")


def is_swin(state: State) -> bool:
    buffers = any(key.startswith("layers.") and key.endswith("relative_position_index") for key in state)
    return buffers or "layers.0.downsample.reduction.weight" in state or is_esvit(state)


def from_swin(state: State) -> State:
    """Swin v1 or v2: patch merging at the next stage, the bias network and the classifier under timm's names."""
    moved = {re.sub(r"^layers\.(\d+)(?=\.downsample\.)", _next_stage, key): value for key, value in state.items()}
    return rename(without(moved, BUFFERS), [(r"\.rpe_mlp\.", ".cpb_mlp."), (r"^head\.(?!fc\.)", "head.fc.")])


def _next_stage(stage: re.Match[str]) -> str:
    """Upstream merges patches at the end of a stage, timm at the start of the next."""
    return f"layers.{int(stage[1]) + 1}"


is_esvit = any_starts("head_dense.")


def from_esvit(state: State) -> State:
    """The backbone of a self-supervised Swin, without its two heads."""
    return from_swin(without(state, r"^head\.|^head_dense\."))


def is_fd(state: State) -> bool:
    student = below("encoder.", state)
    return is_beit(student) or any_starts("layers.")(student)


def from_fd(state: State) -> State:
    """The student of a distillation checkpoint; its projector and the whole teacher are expendable."""
    student = tower("encoder.", state, FD_BESIDE)
    return from_swin(student) if any_starts("layers.")(student) else from_beit(student)
