"""Zero-shot classification: the text tower's vectors of prompts about a class are its classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 100.0


def prompts(name: str | Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with the class's name in place of {}; of several names the first."""
    first = name if isinstance(name, str) else name[0]
    return [template.format(first) for template in templates]


def classifier(texts_CPE: Tensor) -> Tensor:
    """(E, C) from the vectors of P prompts a class: each to unit length, averaged, and to unit length again."""
    return F.normalize(F.normalize(texts_CPE, dim=-1).mean(1), dim=-1).T


def probabilities(images_NE: Tensor, classifier_EC: Tensor, scale: float = SCALE) -> Tensor:
    """(N, C): softmax of the scaled cosines, in float32 or wider; metrics are taken of these, where large ones tie."""
    images_NE = images_NE.to(torch.promote_types(images_NE.dtype, torch.float32))
    return (scale * F.normalize(images_NE, dim=-1) @ classifier_EC.to(images_NE.dtype)).softmax(-1)
