"""Layer-wise learning rates and the decay rule of BEiT-style fine-tuning (Feature-Distillation notes, section 7)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from core.optim import decay_groups

TOKENS = ("cls_token", "pos_embed")
EMBEDDINGS = ("cls_token", "pos_embed", "mask_token", "patch_embed.")
SWIN_FREE = ("cpb_mlp", "logit_scale", "relative_position_bias_table")  # parts of Swin's names that are not decayed
BLOCK = re.compile(r"^(?:layers\.(\d+)\.)?blocks\.(\d+)\.")
MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")


def bias_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups with and without decay: one-dimensional tensors, biases, class token and position table are free.

    A ViT's bias tables are decayed; of a Swin (blocks below `layers.`) the bias network, logit scales and tables are
    not. A projector's weight is decayed.
    """
    named = list(named)
    free = {name for name, _ in named if "layers." in name and any(part in name for part in SWIN_FREE)}
    return decay_groups(named, weight_decay, {*TOKENS, *free})


class LayerIds:
    """Depth of a timm ViT's or Swin's parameters: 0 embeddings, i + 1 block i, last the final norm and the rest.

    names: of all parameters, without prefix.  Blocks of a Swin are numbered through; the patch merging that timm has at
    the start of a stage belongs to the block before it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        found = {(int(m[1] or 0), int(m[2])) for m in map(BLOCK.match, names) if m}
        self._number = {place: i + 1 for i, place in enumerate(sorted(found))}
        self.count = len(found) + 2

    def __call__(self, name: str) -> int:
        if name.startswith(EMBEDDINGS):
            return 0
        if block := BLOCK.match(name):
            return self._number[int(block[1] or 0), int(block[2])]
        if merging := MERGING.match(name):
            return max(i for (stage, _), i in self._number.items() if stage < int(merging[1]))
        return self.count - 1


def layer_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, layer_decay: float, prefix: str = ""
) -> list[dict[str, Any]]:
    """`bias_groups` cut by layer, each with `layer` and lr_scale = layer_decay ** (layers - 1 - layer).

    prefix: of the network's names; parameters without it (a classifier beside it) count as the last layer.
    """
    named = list(named)
    layer_of = LayerIds(name.removeprefix(prefix) for name, _ in named)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for whole in bias_groups(named, weight_decay):
        for name, parameter in zip(whole["names"], whole["params"], strict=True):
            layer = layer_of(name.removeprefix(prefix)) if name.startswith(prefix) else layer_of.count - 1
            group = groups.setdefault((layer, whole["weight_decay"] > 0), {
                "params": [], "names": [], "weight_decay": whole["weight_decay"], "layer": layer,
                "lr_scale": layer_decay ** (layer_of.count - 1 - layer),
            })  # fmt: skip
            group["params"].append(parameter)
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
