"""Weight files: safe reading, upstream key layouts to timm's (`core.models.layouts`), strict loading."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.models.layouts import LAYOUTS as LAYOUTS
from core.models.layouts import NESTED, State
from core.models.layouts.keys import WeightsError as WeightsError
from core.models.layouts.keys import below
from core.models.torchscript import is_torchscript, read_torchscript
from core.models.vit import fit_pos_embed

PREFIXES = ("module.", "_orig_mod.")


def unwrap(state: Mapping[str, Any], nested: Sequence[str] = NESTED) -> State:
    """The tensors of a checkpoint: out of its nested dictionaries, without the prefixes of data parallelism."""
    for key in nested:
        if isinstance(state.get(key), Mapping):
            return unwrap(state[key], nested)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return unwrap(below(prefix, tensors), nested)
    return tensors


def detect(state: Mapping[str, Any]) -> str:
    """Name of the layout of a checkpoint.  Raises WeightsError, with the keys it has, when it holds no tensors."""
    for name, layout in LAYOUTS.items():
        if layout.fits(unwrap(state, layout.nested)):
            return name
    raise WeightsError(
        f"no weights found below any of {', '.join(NESTED)} or at the top; the keys are: {', '.join(map(str, state))}"
    )


def to_timm(state: Mapping[str, Any], layout: str | None = None) -> State:
    """Weights under timm's names, from a checkpoint in any of LAYOUTS (None: found from its keys).

    Raises WeightsError: unknown layout, no tensors, or keys that are neither of the network nor known to be expendable.
    """
    name = detect(state) if layout is None else layout
    if name not in LAYOUTS:
        raise WeightsError(f"unknown layout {name!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name].to_timm(unwrap(state, LAYOUTS[name].nested))


def load_strict(
    model: nn.Module, state: Mapping[str, Any], layout: str | None = None, fit_positions: bool = False
) -> None:
    """Load a state dict, in timm's or an upstream layout, into a timm model: every key and shape must match.

    Only a model without classifier (num_classes=0) may leave out the classifier that the file holds, and only a
    projection may have a bias that the file does not.

    Raises:
        WeightsError: lists all missing and unexpected keys and all shapes that differ; the model is left as it was.
    """
    own = model.state_dict()
    if layout is None:  # names that are all the model's own need no guess: CNNs have blocks.N.M. as DINOv2's files do
        layout = "timm" if not _mismatches(own, _given(model, own, state, "timm", fit_positions)) else detect(state)
    given = _given(model, own, state, layout, fit_positions)
    problems = _mismatches(own, given)
    if problems:
        heading = f"weights (read as layout {layout}) do not fit {type(model).__name__}"
        raise WeightsError("\n  ".join([heading, *problems]))
    model.load_state_dict(given, strict=True)


def _given(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Any], layout: str, fit_positions: bool
) -> State:
    """What the file holds for the model, read as `layout`."""
    given = to_timm(state, layout)
    if getattr(model, "num_classes", None) == 0:
        given = {key: value for key, value in given.items() if key in own or not key.startswith(_classifiers(model))}
    given |= {key: torch.zeros_like(own[key]) for key in _fixed_biases(model) - given.keys()}
    if fit_positions and isinstance(model, VisionTransformer) and "pos_embed" in own.keys() & given.keys():
        given["pos_embed"] = fit_pos_embed(model, given["pos_embed"])
    return given


def _fixed_biases(model: nn.Module) -> set[str]:
    """Biases of a projection, which upstream does not have."""
    named = model.named_parameters()
    return {key for key, p in named if key in ("head.bias", "head.fc.bias") and not p.requires_grad}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return ("head.", *(f"{name}." for name in ([named] if isinstance(named, str) else named)))


def _mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [key for key in sorted(own.keys() & given.keys()) if own[key].shape != given[key].shape]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
    return problems + [f"{key}: file {tuple(given[key].shape)}, model {tuple(own[key].shape)}" for key in shapes]


def _harmless() -> list[Any]:
    """Plain data that released checkpoints hold beside tensors: argument namespaces and numeric arrays."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    numpy_1 = [(core._reconstruct, "numpy.core.multiarray._reconstruct"), (core.scalar, "numpy.core.multiarray.scalar")]
    numpy_2 = [core._reconstruct, core.scalar, np.ndarray, np.dtype]
    return [argparse.Namespace, *numpy_1, *numpy_2, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint as its file holds it, on the CPU: safetensors, a torch archive of plain data, or TorchScript.

    Raises:
        WeightsError: no such file, damaged, or it needs pickled objects, which are never run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path, device="cpu"))
        if is_torchscript(path):
            return dict(read_torchscript(path))
        with torch.serialization.safe_globals(_harmless()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise WeightsError(_refusal(path, str(error))) from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _refusal(path: Path, reason: str) -> str:
    found = re.search(r"GLOBAL (\w[\w.]*)", reason)
    if found is None:
        return f"{path}: damaged, or neither a safetensors file nor a torch archive; fetch it again or convert it"
    return (
        f"{path}: needs an object {found[1]}, and only plain data is read. If you trust the file, convert "
        "it once where it was made: safetensors.torch.save_file(state, 'weights.safetensors') with its state dict"
    )
