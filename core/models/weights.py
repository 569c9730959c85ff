"""Weight files: safe reading, upstream key layouts to timm's, strict loading, hashes."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]
# Where upstream projects put the weights, in order of preference: of a self-distilled pair the teacher is published.
NESTED = ("teacher", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
CHUNKED = re.compile(r"(?:encoder\.)?blocks\.\d+\.\d+\.")


class WeightsError(RuntimeError):
    """A weight file cannot be read or does not fit. The message names the file or the keys, and the fix."""


@dataclass(frozen=True)
class Layout:
    """One upstream naming of a ViT's weights, told from its keys once wrappers are off."""

    fits: Callable[[State], bool]
    to_timm: Callable[[State], State]


def _below(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _same(state: State) -> State:
    return dict(state)


def _from_dino(state: State) -> State:
    """DINO family: in a training checkpoint the network is below `backbone.`, beside a projection head."""
    backbone = _below("backbone.", state) or dict(state)
    return _from_dinov2(backbone) if _is_dinov2(backbone) else backbone


def _from_deit3(state: State) -> State:
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()}


def _from_dinov2(state: State) -> State:
    """DINOv2: block chunks blocks.{chunk}.{i} (i counts over all chunks), SwiGLU names, registers without positions."""
    out = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    out = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for key, v in out.items()}
    out.pop("mask_token", None)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def _from_unic(state: State) -> State:
    """Released UNIC student: the encoder alone; the ladder `lp.*` is expendable."""
    return _from_dinov2(_below("encoder.", state))


def _has(*keys: str) -> Callable[[State], bool]:
    return lambda state: all(key in state for key in keys)


def _is_dinov2(state: State) -> bool:
    named = {"register_tokens", "blocks.0.mlp.w12.weight", "mask_token"} & state.keys()
    return bool(named) or any(CHUNKED.match(key) for key in state)


# The first layout that fits is taken. Anything else counts as timm's own naming, which strict loading then checks.
LAYOUTS: dict[str, Layout] = {
    "unic": Layout(lambda state: any(key.startswith("encoder.blocks.") for key in state), _from_unic),
    "dino": Layout(lambda state: any(key.startswith("backbone.") for key in state), _from_dino),
    "ibot": Layout(lambda state: False, _from_dino),  # told from dino by nothing
    "deit3": Layout(_has("blocks.0.gamma_1"), _from_deit3),
    "dinov2": Layout(_is_dinov2, _from_dinov2),
    "dbot_ft": Layout(lambda state: "fc_norm.weight" in state and "norm.weight" not in state, _same),
    "timm": Layout(lambda state: bool(state), _same),
}


def unwrap(state: Mapping[str, Any]) -> State:
    """The tensors of a checkpoint: out of its nested dictionaries, without the prefixes of data parallelism."""
    for key in NESTED:
        if isinstance(state.get(key), Mapping):
            return unwrap(state[key])
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return unwrap(_below(prefix, tensors))
    return tensors


def detect(state: Mapping[str, Any]) -> str:
    """Name of the layout of a checkpoint.  Raises WeightsError, with the keys it has, when it holds no tensors."""
    tensors = unwrap(state)
    for name, layout in LAYOUTS.items():
        if layout.fits(tensors):
            return name
    raise WeightsError(
        f"no weights found below any of {', '.join(NESTED)} or at the top; the keys are: {', '.join(map(str, state))}"
    )


def to_timm(state: Mapping[str, Any], layout: str | None = None) -> State:
    """Weights under timm's names, from a checkpoint in any of LAYOUTS (None: found from its keys)."""
    name = detect(state) if layout is None else layout
    if name not in LAYOUTS:
        raise WeightsError(f"unknown layout {name!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name].to_timm(unwrap(state))


def load_strict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict, in timm's or an upstream layout, into a timm model: every key and shape must match.

    Only a model without classifier (num_classes=0) may leave out the classifier that the file holds.

    Raises:
        WeightsError: lists all missing and unexpected keys and all shapes that differ; the model is left as it was.
    """
    own = model.state_dict()
    layout = detect(state)
    given = to_timm(state, layout)
    if getattr(model, "num_classes", None) == 0:
        given = {key: value for key, value in given.items() if key in own or not key.startswith(_classifiers(model))}
    problems = _mismatches(own, given)
    if problems:
        heading = f"weights (read as layout {layout}) do not fit {type(model).__name__}"
        raise WeightsError("\n  ".join([heading, *problems]))
    model.load_state_dict(given, strict=True)


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
    """A checkpoint as its file holds it, on the CPU: safetensors, or a torch archive of plain data.

    Raises:
        WeightsError: no such file, damaged, or it needs pickled objects, which are never run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path, device="cpu"))
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


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
