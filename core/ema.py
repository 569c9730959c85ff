"""An average of the trained weights over time, in float32, that every rank holds whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

PREFIX = "average/"  # of the parameters' names in `state`


class Fragment(Protocol):
    """A run of one parameter's flattened elements, see core.engine."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def numel(self) -> int: ...
    def view(self, kind: str, /) -> Tensor: ...


class Weights(Protocol):
    """What an engine tells of its float32 master weights."""

    device: torch.device
    replicated: bool  # every rank's fragments are all there is, so nothing has to be exchanged
    shapes: dict[str, tuple[int, ...]]  # of all trained parameters, whoever holds them

    @property
    def module(self) -> nn.Module: ...

    def fragments(self) -> Sequence[Fragment]: ...


@torch.no_grad()
def average_(average: Mapping[str, Tensor], values: Mapping[str, Tensor], momentum: float) -> None:
    """average <- momentum average + (1 - momentum) values in place, by name; no warm-up.

    Integers (counters of batch normalisation) are averaged as numbers and lose their fraction each time; those that
    agree (indices of position biases) stay what they are.
    """
    for name, old in average.items():
        new = values[name].to(old.device)
        if old.is_floating_point():
            old.mul_(momentum).add_(new.to(old.dtype), alpha=1.0 - momentum)
        else:
            mixed = (old.double() * momentum + new.double() * (1.0 - momentum)).to(old.dtype)
            old.copy_(torch.where(old == new, old, mixed))


class Average:
    """Exponential moving average of an engine's master weights and a network in evaluation mode that carries it.

    Equal on all ranks, and the same bits for any world size and ZeRO stage that give the same weights: ranks add their
    fragments to vectors of zeros. Buffers are averaged as weights are; frozen parameters are as the network was built.

    Args:
        network: a module with the engine's names and shapes; it is moved to the device and to `dtype`.
        engine: whose weights are followed; the average starts as they are now.
    """

    def __init__(self, network: nn.Module, engine: Weights, dtype: torch.dtype) -> None:
        self.engine = engine
        self._wide = torch.promote_types(next(network.parameters()).dtype, torch.float32)
        self.network = network.to(engine.device).to(dtype).eval().requires_grad_(False)
        self._copies = {name: p.data for name, p in network.named_parameters() if name in engine.shapes}
        sizes = [p.numel() for p in self._copies.values()]
        self._offsets = dict(zip(self._copies, accumulate(sizes, initial=0), strict=False))
        self.flat = self._gathered(sum(sizes))
        parts = torch.split(self.flat, sizes)
        self._views = [part.view_as(p) for part, p in zip(parts, self._copies.values(), strict=True)]
        self._network_buffers = _persistent(network)
        self._buffers = {name: value.to(self._wide if value.is_floating_point() else value.dtype, copy=True)
                         for name, value in _persistent(engine.module).items()}  # fmt: skip
        self._refresh()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average <- momentum average + (1 - momentum) weights. All ranks must call it."""
        average_({"": self.flat}, {"": self._gathered(self.flat.numel())}, momentum)
        average_(self._buffers, _persistent(self.engine.module), momentum)
        self._refresh()

    def state(self) -> dict[str, Tensor]:
        """The average by parameter and buffer, under names that begin with PREFIX."""
        named = dict(zip(self._copies, self._views, strict=True)) | self._buffers
        return {f"{PREFIX}{name}": value for name, value in named.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over `state()`; other entries are left alone."""
        for name, own in self.state().items():
            own.copy_(state[name])
        self._refresh()

    def _gathered(self, size: int) -> Tensor:
        """All master weights in one vector."""
        flat = torch.zeros(size, device=self.engine.device, dtype=self._wide)
        for fragment in self.engine.fragments():
            flat.narrow(0, self._offsets[fragment.name] + fragment.start, fragment.numel).copy_(fragment.view("weight"))
        if not self.engine.replicated and dist.is_initialized():
            dist.all_reduce(flat)
        return flat

    @torch.no_grad()
    def _refresh(self) -> None:
        torch._foreach_copy_(list(self._copies.values()), self._views)
        for name, value in self._buffers.items():
            self._network_buffers[name].copy_(value)


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state dict."""
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}
