"""Frozen features of labelled images under the evaluation transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import ConfigError
from core.data.loader import eval_batches
from core.data.source import Source
from core.data.views import normalize

Extractor = Callable[[Tensor], Tensor]  # (B, 3, S, S) normalised -> (B, D)


@dataclass(frozen=True)
class FeatureSet:
    features: Tensor  # (N, D) float32, CPU
    labels: Tensor  # (N,) int64

    def to(self, device: torch.device) -> FeatureSet:
        return FeatureSet(self.features.to(device), self.labels.to(device))


@torch.inference_mode()
def extract(extractors: dict[str, Extractor], source: Source, img_size: int, device: torch.device, batch: int = 256,
            workers: int = 0) -> dict[str, FeatureSet]:  # fmt: skip
    """Features of every model from one pass over the images; samples that cannot be decoded are left out."""
    found: dict[str, list[Tensor]] = {name: [] for name in extractors}
    labels = []
    for images, label, _ in eval_batches(source, img_size, batch, workers):
        x = normalize(images.to(device))
        if bool((label < 0).any()):
            raise ConfigError("evaluate: some images have no label; put each into the folder of its class")
        labels.append(label)
        for name, extractor in extractors.items():
            found[name].append(extractor(x).float().cpu())
    target = torch.cat(labels)
    if not len(target):
        raise ConfigError(f"evaluate: none of {len(source)} images can be decoded")
    return {name: FeatureSet(torch.cat(parts), target) for name, parts in found.items()}
