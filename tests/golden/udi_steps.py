"""Whole UDI steps: the golden cases `train_step_*` through the method and an engine.

In float64 through `core.plain` (the runner), and in float32 through `core.engine` at every ZeRO stage (the tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.comm import Comm
from core.data.udi_crops import GLOBALS, local_names
from core.ema import PREFIX, Average
from core.engine import Engine
from core.losses_udi import LEVELS
from core.methods.base import Batch
from core.methods.udi import Udi, UdiOptions
from core.models.clip import set_norm_eps
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.udi_more import released_module
from tests.ranks import run_ranks

Case = Mapping[str, Any]
Check = tuple[str, Any, Any, float]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}  # from the folder's README
SAMPLED = 4  # tokens around an interpolated place


def train_step(case: Case, stage: int | None = None) -> list[Check]:
    """stage: of ZeRO, in float32 on two ranks that see the same images; None: plain float64.

    A batch that is split has other patch losses and centres, as these are normalised by what a rank has.
    """
    arrays = {key: case[key] for key in case}
    if stage is None:
        return _checks(arrays, _run(arrays, None), torch.float64)
    first, second = run_ranks(_run, 2, arrays, stage)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    return _checks(arrays, first, torch.float32)


def _run(case: dict[str, np.ndarray], stage: int | None) -> dict[str, np.ndarray]:
    """All steps of the case; arrays under the case's names."""
    comm, dtype = Comm(torch.device("cpu")), torch.float64 if stage is None else torch.float32
    method = _method(case, comm.world)
    module, teacher = (_module(case).to(dtype) for _ in range(2))
    groups, clip = method.param_groups(module), method.per_parameter_clip
    engine: Engine | PlainEngine = PlainEngine(module, groups, method.settings, comm, clip)
    if stage is not None:
        engine = Engine(module, groups, method.settings, zero_stage=stage, world=comm.world,
                        per_parameter_clip=clip, device=comm.device)  # fmt: skip
    method.teacher = Average(teacher, engine, dtype)
    if not bool(case["teacher_is_copy"]):
        method.teacher.load_state({key.replace("teacher0/", PREFIX): torch.from_numpy(case[key]) for key in case
                                   if key.startswith("teacher0/")})  # fmt: skip
    method.centre.center = method.centre.center.to(dtype)
    engine.train(True)
    out: dict[str, np.ndarray] = {}
    for step in range(int(case["steps"])):
        at, values = f"s{step}/", method.schedules(step)
        batch = _batch(case, at, dtype)
        local = method.teacher.network.read(batch)[2]
        if local is not None:  # predictions at single positions of small crops, which the product averages first
            positions = method.teacher.network.head[0].last_layer(local)
            out[f"{at}teacher_l{LEVELS.index('patch')}"] = positions.flatten(1, 2).numpy()
        targets = method.targets({}, batch)
        outputs = engine.forward(batch)
        loss, parts = method.losses(outputs, targets, batch)
        engine.backward(loss)
        out |= {f"{at}{name}": value.detach().numpy() for name, value in _logits(outputs, targets).items()}
        out[f"{at}loss"] = loss.detach().numpy()
        for kind in ("global", "local"):
            names = [f"{kind[0]}_{level}" for level in ("cl", "mcl", "pch")]
            out[f"{at}parts_{kind}"] = np.array([float(parts.get(name, -1.0)) for name in names])
        if stage is None:  # an engine keeps gradients to itself
            out |= _gradients(case, at, module)
        engine.step(lambda scale, values=values: values["lr"] * scale, values["weight_decay"])
        method.after_step(step, comm)
    out["center1"] = method.centre.center.numpy()
    own = Average(_module(case).to(dtype), engine, dtype).state()  # started now, so it is the weights
    average = method.teacher.state()
    for name in map(str, case["param_order"]):
        fixed = case[f"student0/{name}"]
        out[f"student1/{name}"] = own[PREFIX + name].numpy() if PREFIX + name in own else fixed
        out[f"teacher1/{name}"] = average[PREFIX + name].numpy() if PREFIX + name in average else fixed
    out["param_order"] = np.array([name for name, _ in module.named_parameters()])
    vit = module.backbone.backbone
    sizes = {"img": vit.patch_embed.img_size[0], "patch": vit.patch_embed.patch_size[0], "dim": vit.embed_dim,
             "depth": len(vit.blocks), "mlp_ratio": vit.blocks[0].mlp.fc1.out_features // vit.embed_dim}  # fmt: skip
    out |= {name: np.array(size) for name, size in sizes.items()}
    out["trainable"] = np.array([name in engine.shapes for name in out["param_order"]])
    return out


def _method(case: Case, world: int) -> Udi:
    class Recorded(Udi):
        """UDI with the recorded values of its schedules."""

        def schedules(self, step: int) -> dict[str, float]:
            return {"lr": float(case["lr"][step]), "weight_decay": float(case["wd"][step]),
                    "teacher_momentum": float(case["momentum"][step])}  # fmt: skip

    temperature = (float(case["temp"]), float(case["temp"]))
    options = UdiOptions(
        local_crops=int(case["n_local"]), local_size=int(case["local"]), srs_heads=int(case["srs_heads"]),
        hidden=int(case["hidden"]), bottleneck=int(case["bottleneck"]), out=int(case["K"]), alpha=float(case["alpha"]),
        norm_last_layer=bool(case["norm_last_layer"]), freeze_epochs=int(case["freeze_last_layer"]),
        temperature=temperature, student_temperature=float(case["student_temp"]),
        center_momentum=float(case["center_momentum"]),
    )  # fmt: skip
    batch, betas = int(case["batch"]), (float(case["betas"][0]), float(case["betas"][1]))
    settings = Train(
        img_size=int(case["img"]), batch=batch * world, micro_batch=batch, betas=betas, eps=float(case["eps"]),
        clip=float(case["clip"]), weight_decay=float(case["wd"][0]), precision="fp32",
    )  # fmt: skip
    steps = int(case["steps"])
    method = Recorded(options, settings, steps)
    # The recorded steps all lie in one epoch: before or behind the end of the last layer's rest.
    method.epoch_steps = steps if int(case["epoch"]) < options.freeze_epochs else 0
    return method


def _module(case: Case) -> nn.Module:
    state = {key.removeprefix("student0/"): torch.from_numpy(np.asarray(case[key], np.float32).copy())
             for key in case if key.startswith("student0/")}  # fmt: skip
    train_gain = not bool(case["norm_last_layer"])
    module = released_module(state, int(case["heads"]), int(case["srs_heads"]), train_gain)
    module.load_state_dict(state, strict=True)
    set_norm_eps(module, float(case["eps_ln"]))
    return module


def _batch(case: Case, at: str, dtype: torch.dtype) -> Batch:
    def images(name: str) -> Tensor:
        return torch.from_numpy(case[f"{at}{name}"]).to(dtype)

    views = dict(zip(GLOBALS, images("global"), strict=True))
    views |= dict(zip(local_names(int(case["n_local"])), images("local"), strict=True))
    source = torch.from_numpy(case[f"{at}src_maps_global"]).transpose(0, 1)  # (B, 2, s, N)
    target, weight = _sparse(torch.from_numpy(case[f"{at}tgt_maps_global"]).transpose(0, 1).to(dtype))
    extra = {"source": source.argmax(-1), "valid": source.sum(-1).to(dtype), "target": target, "weight": weight}
    local = torch.from_numpy(case[f"{at}tgt_maps_local"]).to(dtype).unflatten(0, (-1, 2)).permute(2, 0, 1, 3, 4)
    if local.shape[1]:
        extra["local_target"], extra["local_weight"] = _sparse(local)
    return Batch(views, torch.arange(int(case["batch"])), epoch=int(case["epoch"]), extra=extra)


def _sparse(maps: Tensor) -> tuple[Tensor, Tensor]:
    weight, index = maps.topk(min(SAMPLED, maps.shape[-1]), dim=-1)
    return index, weight


def _logits(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """As recorded."""
    out = {}
    for i, level in enumerate(LEVELS):
        if level == "patch":
            out[f"student_g{i}"] = student[level].flatten(0, 1).unsqueeze(0)
            out[f"teacher_g{i}"] = teacher[level].flatten(0, 1).unsqueeze(0)
        else:
            out[f"student_g{i}"] = student[level].flatten(0, 1).unsqueeze(1)
            if f"local_{level}" in student:
                out[f"student_l{i}"] = student[f"local_{level}"].flatten(0, 1).unsqueeze(1)
    return out | {"teacher_g0": teacher["cls"].flatten(0, 1).unsqueeze(1)}


def _gradients(case: Case, at: str, module: nn.Module) -> dict[str, np.ndarray]:
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    zero = torch.zeros(())
    out = {f"{at}grad/{n}": g.detach().clone().numpy() for n, g in grads.items()}
    names = [str(name) for name in case["param_order"]]
    if len(case[f"{at}grad_norms"]) < len(names):  # recorded without the frozen ones
        names = [name for name in names if name in grads]
    norms = [float(grads.get(name, zero).norm()) for name in names]
    return out | {f"{at}grad_norms": np.array(norms)}


def _checks(case: Case, got: dict[str, np.ndarray], dtype: torch.dtype) -> list[Check]:
    """Every recorded result; in float32 what an engine shows, without biases of keys, whose gradient is rounding."""
    tolerance, checks = TOLERANCES[dtype], list[Check]()
    for key, want in case.items():
        name = key.split("/")[-1]
        if key in got and not (dtype == torch.float32 and name.endswith("qkv.bias")):
            checks.append((key, got[key], want, tolerance))
        elif key in got:
            keys = slice(len(want) // 3, 2 * len(want) // 3)
            checks.append((key, np.delete(got[key], keys), np.delete(want, keys), tolerance))
        elif name == "grad_norms" or "/grad/" in key:
            if dtype == torch.float64:
                checks.append((key, np.array(np.nan), want, tolerance))
        elif key.split("/")[0] in ("student1", "teacher1"):
            checks.append((key, np.array(np.nan), want, tolerance))
    return checks
