"""DeepSpeed behind the few calls the loop needs: forward, backward, step, and views of the optimiser's fragments.

The only file that imports DeepSpeed. ZeRO stages 0 to 3 look alike from outside: every rank owns flat fragments
of the fp32 master weights and of Adam's moments, named and addressed per parameter, which is all a checkpoint needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.adamw import ClippedAdamW
from core.config import ConfigError
from core.fragments import SHARDINGS, Fragment
from core.methods.base import Batch, external_parameters
from core.recipe import Train

NO_COMPILER = "TORCHDYNAMO_DISABLE"
Rate = Callable[[float], float]  # lr_scale of a group -> its learning rate


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device.  Raises ConfigError when there is no GPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("launch.device: cuda was asked for and this machine shows no GPU; use launch.device=cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count())  # a scheduler may show a rank only its own GPU
    torch.cuda.set_device(device)
    return device


def init_distributed(device: torch.device, store: Any) -> None:
    """Join the process group of RANK and WORLD_SIZE.

    store: torch's, through which ranks meet. One that torch would make of MASTER_ADDR listens on every network.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":  # the shared-memory op would need a compiler; gloo does not use it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device.type == "cpu" else "nccl"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """DeepSpeed gives an optimiser of its own to torch.compile while it imports it; the compiler loads for seconds."""
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[NO_COMPILER]
        if before is not None:
            os.environ[NO_COMPILER] = before


def shutdown() -> None:
    """Leave the process group; a rank that ends without it may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A trainable module under DeepSpeed ZeRO. Construct it on every rank with equal weights."""

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], settings: Train, *, zero_stage: int, world: int,
        per_parameter_clip: bool, device: torch.device,
    ) -> None:  # fmt: skip
        import deepspeed

        check_precision(settings, zero_stage)
        self.device, self.replicated = device, zero_stage == 0
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        self.frozen = {n: p.detach().clone().cpu() for n, p in module.named_parameters() if not p.requires_grad}
        persistent = module.state_dict()
        self._persistent = [name for name, _ in module.named_buffers() if name in persistent]
        groups = [group for group in groups if group["params"]]
        _check_groups(module, groups)
        self.scales = [group.get("lr_scale", 1.0) for group in groups]
        self.decays = [group["weight_decay"] > 0 for group in groups]
        self.accumulation = settings.batch // settings.micro_batch // world
        self._micro = 0
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._reached = _Reached(module)
        own_clip = settings.clip if per_parameter_clip else 0.0
        self.adam = ClippedAdamW(groups, settings, own_clip, fused=device.type == "cuda")
        module.to(device)
        if zero_stage == 3:
            for reader, parameter in external_parameters(module):
                deepspeed.zero.register_external_parameter(reader, parameter)
        config = _ds_config(settings, zero_stage, self.accumulation, per_parameter_clip)
        with _nothing_compiled():
            self.ds, *_ = deepspeed.initialize(model=module, optimizer=self.adam, config=config)
        self._fragments = SHARDINGS[zero_stage](self)
        self.adam.locate(self._fragments, sharded=zero_stage > 0)

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.ds.module
        return module

    def train(self, on: bool) -> None:
        self.ds.train(on)

    def forward(self, batch: Batch) -> Any:
        """Outputs of the module for one micro-batch, images cast to the compute precision."""
        dtype = torch.bfloat16 if self.ds.bfloat16_enabled() else torch.float32
        return self.ds(replace(batch, views={name: images.to(dtype) for name, images in batch.views.items()}))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's loss; gradients are averaged over all micro-batches."""
        if self._micro:
            self.ds.step()  # DeepSpeed counts micro-batches by its step calls; no update before the last one
        self.ds.backward(loss)
        self._micro += 1

    def step(self, lr: Rate, weight_decay: float | None = None) -> None:
        """One optimiser step after exactly `accumulation` backward calls.  lr: of a group from its lr_scale."""
        assert self._micro == self.accumulation, f"{self._micro} micro-batches instead of {self.accumulation}"
        self._reached.check()
        for group, scale, decays in zip(self.ds.optimizer.param_groups, self.scales, self.decays, strict=True):
            group["lr"] = lr(scale)
            if weight_decay is not None and decays:
                group["weight_decay"] = weight_decay
        self.ds.step()
        self._micro = 0
        self.adam.taken += 1

    def fragments(self) -> list[Fragment]:
        """This rank's share of the fp32 weights and moments; views are live, so they can be read and written."""
        found: list[Fragment] = self._fragments.fragments()
        return found

    @property
    def adam_step(self) -> int:
        """Optimiser steps taken in this stage."""
        return self.adam.taken

    def prepare_load(self, adam_step: int) -> None:
        """Make room for the moments, so that `fragments` can be written before the first step."""
        self.adam.taken = adam_step
        for flat, group in self._fragments.flats():
            self.adam.start(flat, max(adam_step - self.adam.param_groups[group]["frozen_steps"], 0))

    def finish_load(self) -> None:
        """Bring the compute copies of the weights in line with the master weights just written."""
        self._fragments.refresh()

    def buffers(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers: part of the model, not of the optimiser."""
        buffers = dict(self.module.named_buffers())
        return self.frozen | {name: buffers[name].detach().cpu() for name in self._persistent}


def _check_groups(module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless every trainable parameter, and no other, is in one group."""
    grouped = sorted(id(p) for group in groups for p in group["params"])
    wanted = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    if grouped != sorted(wanted):
        left_out = ", ".join(name for key, name in wanted.items() if key not in grouped) or "none"
        raise ValueError(f"the method's groups must hold each trainable parameter once; left out: {left_out}")


def check_precision(settings: Train, zero_stage: int) -> None:
    """Raises ConfigError where DeepSpeed would silently take another trajectory."""
    if settings.precision == "bf16" and zero_stage == 0:
        raise ConfigError("zero.stage: bf16 needs stage 1 or above; use zero.stage=1 or train.precision=fp32")


def _ds_config(settings: Train, stage: int, accumulation: int, per_parameter_clip: bool) -> dict[str, Any]:
    bf16 = settings.precision == "bf16"
    # Small gradients vanish when micro-batches are added up in bf16. DeepSpeed adds in fp32 from stage 2 on; its stage
    # 1 would take another optimiser, whose fragments lie elsewhere: so stage 1 in bf16 cuts gradients as well.
    stage = max(stage, 2) if bf16 else stage
    clips = settings.clip > 0 and not per_parameter_clip
    norm = {"compute_grad_norm": clips} if stage in (1, 2) else {}  # an unused norm would cost a host sync a step
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if per_parameter_clip else settings.clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": False},  # the check is a host sync a step
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "round_robin_gradients": False} | norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


class _Reached:
    """Sees in the first step that every trainable parameter gets a gradient.

    One without would be left out at stage 0 and decayed with a gradient of zero at the others.
    """

    def __init__(self, module: nn.Module) -> None:
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._missing = set(wanted)
        self._hooks = [
            p.register_hook(partial(self._seen, name))  # type: ignore[no-untyped-call]
            for name, p in wanted.items()
        ]

    def _seen(self, name: str, grad: Tensor) -> None:
        self._missing.discard(name)

    def check(self) -> None:
        """Raises ValueError that names the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._missing:
            names = ", ".join(sorted(self._missing))
            raise ValueError(f"no gradient reaches {names}: the method's build must set requires_grad False for these")
