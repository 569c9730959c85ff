"""Checkpoints into networks: out of their wrappings, from upstream key layouts to timm's, and strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.models.files import read as read
from core.models.layouts import LAYOUTS as LAYOUTS
from core.models.layouts import NESTED, State
from core.models.layouts.keys import WeightsError as WeightsError
from core.models.layouts.keys import below, few
from core.models.misfit import Try, describe, mismatches
from core.models.vit import fit_pos_embed

# Names of modules that hold another one and nothing else: of torch.compile, of checkpointed and of sharded training.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
PARALLEL, AVERAGED = "module.", "n_averaged"  # of data parallelism, and the counter beside an averaged model
MOST_NESTED = 4  # dictionaries in each other


def unwrap(state: Mapping[str, Any], nested: Sequence[str] = NESTED, depth: int = MOST_NESTED) -> State:
    """The tensors of a checkpoint: out of its nested dictionaries, without names that training put around the modules'.

    Raises WeightsError for a tensor that is not stored as such, or where two keys become one.
    """
    for key in nested:
        inside = state.get(key)
        if isinstance(inside, Mapping) and depth and (found := unwrap(inside, nested, depth - 1)):
            return found
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor) and k != AVERAGED}
    for key, value in tensors.items():
        _check_stored(key, value)
    tensors = _renamed(tensors, WRAPPERS, "")
    while tensors and all(key.startswith(PARALLEL) for key in tensors):
        tensors = below(PARALLEL, tensors)
    return tensors


def _check_stored(key: str, value: Tensor) -> None:
    plain = value.layout is torch.strided and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise WeightsError(f"weights: {few([key])} is sparse, quantised, or shows more numbers than are stored")


def _renamed(tensors: State, pattern: re.Pattern[str], replacement: str) -> State:
    out: State = {}
    for key, value in tensors.items():
        name = pattern.sub(replacement, key)
        if name in out:
            raise WeightsError(f"weights: two keys of the file become {few([name])}, one of them {few([key])}")
        out[name] = value
    return out


def detect(state: Mapping[str, Any]) -> str:
    """Name of the layout of a checkpoint.  Raises WeightsError, with the keys it has, when it holds no tensors."""
    for name, layout in LAYOUTS.items():
        if layout.fits(unwrap(state, layout.nested)):
            return name
    kinds = sorted({type(value).__name__ for value in state.values()})
    raise WeightsError(
        f"no weights found below any of {', '.join(NESTED)} or at the top; the keys are: {few(state)}"
        + (f" (of {few(kinds, 3)}: only torch's tensors are read)" if kinds else "")
    )


def to_timm(state: Mapping[str, Any], layout: str | None = None) -> State:
    """Weights under timm's names, from a checkpoint in any of LAYOUTS (None: found from its keys).

    Raises WeightsError: unknown layout, no tensors, or keys that are neither of the network nor known to be expendable.
    """
    name = detect(state) if layout is None else layout
    if name not in LAYOUTS:
        raise WeightsError(f"unknown layout {name!r}; known are {', '.join(LAYOUTS)}")
    try:
        return LAYOUTS[name].to_timm(unwrap(state, LAYOUTS[name].nested))
    except WeightsError:
        raise
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # a layout whose marks are there but not the rest
        raise WeightsError(f"weights look like layout {name} and are not: {few([error])}") from None


def load_strict(
    model: nn.Module, state: Mapping[str, Any], layout: str | None = None, fit_positions: bool = False
) -> None:
    """Load a state dict, in timm's or an upstream layout, into a timm model: every key and shape must match.

    Only a model without classifier (num_classes=0) may leave out the classifier that the file holds, and only a
    projection may have a bias that the file does not.

    Raises:
        WeightsError: says what is missing, unexpected or of another shape; the model is left as it was.
    """
    model.load_state_dict(fitted(model, state, layout, fit_positions), strict=True)


def fitted(model: nn.Module, state: Mapping[str, Any], layout: str | None = None, fit_positions: bool = False) -> State:
    """What a state dict holds for a model, under its names and in its shapes: `load_strict` without loading.

    Works on shapes alone: the model may be on the meta device, and the tensors without numbers.  Raises WeightsError.
    """
    own = model.state_dict()
    for seen in _readings(state):
        # Names that are all the model's own need no guess: CNNs have blocks.N.M. as DINOv2's files do.
        for tried in ("timm", detect(seen)) if layout is None else (layout,):
            try:
                given = _given(model, own, to_timm(seen, tried), fit_positions)
            except WeightsError:
                continue
            if not mismatches(own, given):
                return given
    raise WeightsError(describe(model, own, unwrap(state), _tries(model, own, state, layout, fit_positions)))


def _readings(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A checkpoint as it is, and without the wrappers of data parallelism around parts of it."""
    yield state
    tensors = unwrap(state)
    if any(f".{PARALLEL}" in key for key in tensors):
        yield _renamed(tensors, re.compile(r"(?<=\.)module\."), "")


def _tries(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Any], layout: str | None, fit_positions: bool
) -> Iterator[Try]:
    """The state dict read as each layout whose marks it has, the one that it seems to have first."""
    marked = [name for name, each in LAYOUTS.items() if each.fits(unwrap(state, each.nested))]
    for name in [layout] if layout else marked:
        try:
            yield name, _given(model, own, to_timm(state, name), fit_positions)
        except WeightsError as error:
            yield name, error


def _given(model: nn.Module, own: Mapping[str, Tensor], given: State, fit_positions: bool) -> State:
    """Weights under timm's names without what the model has no part for."""
    if getattr(model, "num_classes", None) == 0:
        given = {key: value for key, value in given.items() if key in own or not key.startswith(_classifiers(model))}
    given |= {key: torch.zeros_like(own[key]) for key in _fixed_biases(model) - given.keys()}
    if fit_positions and isinstance(model, VisionTransformer) and "pos_embed" in own.keys() & given.keys():
        try:
            given["pos_embed"] = fit_pos_embed(model, given["pos_embed"])
        except (IndexError, ValueError, RuntimeError):  # no table at all: its shape is told with the others'
            return given
    return given


def _fixed_biases(model: nn.Module) -> set[str]:
    """Biases of a projection, which upstream does not have."""
    named = model.named_parameters()
    return {key for key, p in named if key in ("head.bias", "head.fc.bias") and not p.requires_grad}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return ("head.", *(f"{name}." for name in ([named] if isinstance(named, str) else named)))
