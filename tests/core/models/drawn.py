"""A network whose weights are all drawn: as timm initialises them, many are 0 or 1 and would hide what they do."""

from __future__ import annotations

from typing import Any

import torch

from core.models.students import create


def network(name: str, args: dict[str, Any]) -> Any:
    """In float64 and evaluation mode, the same at each call."""
    torch.manual_seed(0)
    model = create(name, args, None, "student").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
