"""Deviations relative to the largest magnitude of an array, as some folders state their tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.golden.runner import Check


def relative(name: str, got: Any, want: Any, tolerance: float) -> Check:
    """Both sides over max |want|."""
    got, want = (value.detach().numpy() if isinstance(value, torch.Tensor) else np.asanyarray(value)
                 for value in (got, want))  # fmt: skip
    top = float(np.abs(want).max(initial=0.0)) or 1.0
    return name, got / top, want / top, tolerance
