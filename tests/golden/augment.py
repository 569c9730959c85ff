"""UNIC's image transforms against the golden cases `augment` and `center_pad`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from core.data.pillow import eval_pil
from core.data.views import Colour, apply_colour, center_pad, eval_tensor, random_resized_crop

Arrays = Mapping[str, Any]
Check = tuple[str, Any, Any, float]
TOLERANCE = 2e-5  # float rounding; a wrong truncation is 0.017


def augment(case: Arrays) -> list[Check]:
    """(name, got, want, tolerance) of every training view, the validation and the evaluation image."""
    size = int(case["hp.size"])
    image = torch.from_numpy(case["in.image"])
    draws = zip(case["in.box"], case["in.flip"], strict=True)
    crops = torch.stack([random_resized_crop(image, box, bool(flip), size) for box, flip in draws])
    colour = Colour(
        jit=case["in.jit"],
        order=case["in.order"],
        factors=case["in.fac"],
        gray=case["in.gray"],
        sigma=case["in.blur"],
        solarise=case["in.sol"],
    )
    got = {f"image.{k}": view for k, view in enumerate(apply_colour(crops, colour))}
    got["val_image"] = eval_tensor(image, size)
    got["eval_image"] = eval_pil(image, size, size)
    return [(name, view.numpy(), case[f"out.{name}"], TOLERANCE) for name, view in got.items()]


def pad(case: Arrays) -> list[Check]:
    """The symmetric border for segmentation, exact."""
    got = [center_pad(height, width, multiple) for multiple, height, width in case["in.multiple_h_w"].tolist()]
    return [("h_w_top_bottom_left_right", np.array(got), case["out.h_w_top_bottom_left_right"], 0.0)]
