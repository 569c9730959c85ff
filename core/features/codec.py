"""How teacher outputs are written down: as they are, in fewer bits, or in 8 bits with a scale for each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALED = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}  # type, its largest number
CODECS = (*PLAIN, *SCALED)
SCALE = ".scale"  # added to a tensor's name


class FeatureError(ValueError):
    """Stored features that cannot be made, or are not those that are wanted.  Says what, where, what to do next."""


def encode(codec: str, name: str, values: Tensor) -> dict[str, Tensor]:
    """float (..., D) -> what is stored of it: `name` (..., D) and, in 8 bits, `name`.scale (...) float32.

    The scale maps a token's largest number to the type's.  Nothing waits for a device.
    """
    if codec in PLAIN:
        return {name: values.to(PLAIN[codec])}
    dtype, top = SCALED[codec]
    scale = values.float().abs().amax(-1) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = values.float() / scale.unsqueeze(-1)
    rounded = scaled.round() if dtype == torch.int8 else scaled
    return {name: rounded.clamp(-top, top).to(dtype), name + SCALE: scale}


def decode(name: str, stored: dict[str, Tensor]) -> Tensor:
    """float32 (..., D) of what `encode` stored, on the device where it lies."""
    values = stored[name].float()
    scale = stored.get(name + SCALE)
    return values if scale is None else values * scale.unsqueeze(-1)


def layout(codec: str, outputs: dict[str, list[int]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of a row of every stored tensor.  outputs: shape of a row by name."""
    found = {}
    for name, shape in outputs.items():
        found[name] = (PLAIN[codec] if codec in PLAIN else SCALED[codec][0], tuple(shape))
        if codec in SCALED:
            found[name + SCALE] = (torch.float32, tuple(shape[:-1]))
    return found


def row_bytes(codec: str, outputs: dict[str, list[int]]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout(codec, outputs).values())


def check_finite(what: str, codec: str, stored: dict[str, Tensor]) -> None:
    """Raises FeatureError when numbers were too large for the codec, or were none."""
    for name, part in stored.items():
        if part.is_floating_point() and not torch.isfinite(part.float()).all():
            raise FeatureError(
                f"{what}: {name} holds infinities or NaN as {codec}; use data.codec=bf16, and if they stay, look at "
                "the teacher's weights"
            )
