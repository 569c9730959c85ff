"""Where DeepSpeed keeps each parameter's fp32 weight and moments, by ZeRO stage: named fragments with live views.

Built on DeepSpeed's private fields (`_hp_mapping`, `grad_position`, flat groups), so the package is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from core.adamw import MOMENTS

if TYPE_CHECKING:
    from core.engine import Engine

KINDS = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flattened elements that this rank owns."""

    name: str
    start: int  # first element, in the flattened parameter
    numel: int
    view: Callable[[str], Tensor]  # kind -> flat fp32 view of the optimiser's memory


class Whole:
    """Stage 0: every rank holds everything; for saving, parameters are dealt out to ranks by size."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.named = [(n, p) for n, p in engine.ds.module.named_parameters() if p.requires_grad]
        self.count = len(self.named)

    def flats(self) -> list[tuple[Tensor, int]]:
        return [(p, i) for i, group in enumerate(self.engine.adam.param_groups) for p in group["params"]]

    def layout(self) -> dict[int, list[tuple[int, int, int]]]:
        return {}

    def fragments(self) -> list[Fragment]:
        state = self.engine.adam.state

        def view(parameter: nn.Parameter) -> Callable[[str], Tensor]:
            return lambda kind: (parameter.data if kind == "weight" else state[parameter][kind]).view(-1)

        return [Fragment(name, 0, p.numel(), view(p)) for name, p in self.named]

    def refresh(self) -> None:
        pass


class Partitioned:
    """Stages 1 and 2: each group is one flat vector cut by rank; `_hp_mapping` says which elements are whose."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.zero = engine, engine.ds.optimizer
        self.pieces = list(self._pieces())
        self.count = len(engine.shapes)

    def _pieces(self) -> Iterator[tuple[str, int, int, Tensor, int]]:
        """(name, start in the parameter, numel, flat partition, offset in it) of what this rank owns."""
        for group, parameters in enumerate(self.zero.bit16_groups):
            flat = self.zero.single_partition_of_fp32_groups[group]
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    inside, own = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                    yield self.engine._names[id(parameter)], inside.start, inside.numel, flat, own.start

    def flats(self) -> list[tuple[Tensor, int]]:
        """Flat vectors with the numbers of their parameter groups."""
        return [(flat, group) for group, flat in enumerate(self.zero.single_partition_of_fp32_groups)]

    def layout(self) -> dict[int, list[tuple[int, int, int]]]:
        number = {name: i for i, name in enumerate(self.engine.shapes)}
        out: dict[int, list[tuple[int, int, int]]] = {id(flat): [] for flat, _ in self.flats()}
        for name, _, numel, flat, offset in self.pieces:
            out[id(flat)].append((offset, numel, number[name]))
        return out

    def fragments(self) -> list[Fragment]:
        state = self.engine.adam.state

        def view(flat: Tensor, offset: int, numel: int) -> Callable[[str], Tensor]:
            return lambda kind: (flat.data if kind == "weight" else state[flat][kind]).narrow(0, offset, numel)

        return [Fragment(name, start, n, view(flat, offset, n)) for name, start, n, flat, offset in self.pieces]

    def refresh(self) -> None:
        self.zero.update_lp_params()


class Sharded(Partitioned):
    """Stage 3: every parameter is cut by rank; sub-groups of partitions lie in flat fp32 vectors."""

    def _pieces(self) -> Iterator[tuple[str, int, int, Tensor, int]]:
        rank = dist.get_rank()
        flats = self.zero.fp32_partitioned_groups_flat
        for name, parameter in self.engine.ds.module.named_parameters():
            if not parameter.requires_grad:
                continue
            part = (
                parameter.ds_tensor.ds_numel
                if hasattr(parameter.ds_tensor, "ds_numel")
                else parameter.ds_tensor.numel()
            )
            start = rank * part
            numel = min(part, parameter.ds_numel - start)
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            if numel > 0:
                yield name, start, numel, flats[group], offset

    def flats(self) -> list[tuple[Tensor, int]]:
        return list(zip(self.zero.fp32_partitioned_groups_flat, self.zero.sub_group_to_group_id.values(), strict=True))

    def refresh(self) -> None:
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(group)


SHARDINGS: dict[int, type] = {0: Whole, 1: Partitioned, 2: Partitioned, 3: Sharded}
