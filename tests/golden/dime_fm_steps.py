"""Whole training steps of DIME-FM: the golden cases `train_steps` through the method, the coupled loss and an engine.

In float64 through `core.plain` (the runner), and in float32 through `core.engine` at every ZeRO stage (the tests), with
the batch cut into micro-batches and shared by ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core import coupled
from core.comm import Comm
from core.data.features import IMAGE, TEXT, place_of_texts
from core.engine import Engine
from core.methods.base import Batch
from core.methods.dime_fm import DimeFm, DimeFmOptions
from core.models.students import describe
from core.models.weights import load_strict, to_timm
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.units.dime_fm import SWIN, VIT, network, swin_sizes, timm_names
from tests.ranks import run_ranks

Arrays = dict[str, np.ndarray]
Check = tuple[str, Any, Any, float]
COLUMNS = ("total", "vl", "pvl", "udist", "lr_used")


def train_steps(case: Mapping[str, Any]) -> list[Check]:
    """The float64 run of the runner."""
    return checks(dict(case), _run(dict(case), None, 1), 1e-7)


def at_stage(case: Arrays, stage: int, ranks: int, micros: int) -> list[list[Check]]:
    """Checks of every rank, of float32 runs at a ZeRO stage with the batch in so many micro-batches."""
    return [checks(case, found, 1e-4) for found in run_ranks(_run, ranks, case, stage, micros)]


def checks(case: Arrays, found: Arrays, tolerance: float) -> list[Check]:
    """Rows of every step, and samples and sums of the final weights."""
    columns = [str(name) for name in case["per_step_columns"]]
    switches = zip(COLUMNS[1:4], (True, *case["flags_pvl_udist"]), case["weights"], strict=True)
    unseen = {name for name, on, weight in switches if on and not weight}  # terms that the method does not compute
    out: list[Check] = [
        (f"per_step.{name}", found[name], case["per_step"][:, k], tolerance if name != "lr_used" else 1e-12)
        for k, name in enumerate(columns)
        if name not in unseen
    ]
    for name in (str(key) for key in case["sorted_param_keys"]):
        values = found[f"final/{name}"].astype(np.float64).ravel()
        want = case[f"final/{name}"]
        out.append((f"final/{name}", values[:: max(1, values.size // 64)][:64], want, tolerance))
        out.append((f"final_stats/{name}", [values.sum(), (values**2).sum()], case[f"final_stats/{name}"], tolerance))
    return out


def _run(case: Arrays, stage: int | None, micros: int) -> Arrays:
    """One rank: all steps of the case. stage: of ZeRO, or None for plain float64; micros: parts of a batch."""
    comm, dtype = Comm(torch.device("cpu")), torch.float64 if stage is None else torch.float32
    per_epoch, size = case["images"].shape[:2]
    method, module, student = _build(case, per_epoch, size, size // micros)
    module = module.to(dtype)
    load_strict(student, _params(case, "init/", dtype))
    groups = method.param_groups(module)
    engine: Engine | PlainEngine = PlainEngine(module, groups, method.settings, comm, method.per_parameter_clip)
    if stage is not None:
        engine = Engine(module, groups, method.settings, zero_stage=stage, world=comm.world,
                        per_parameter_clip=method.per_parameter_clip, device=comm.device)  # fmt: skip
    engine.train(True)

    def batch(epoch: int, place: int, micro: int) -> Batch:
        text = place_of_texts(place, len(case["teacher_text"]))[1]
        arrays = case["images"][place], case["teacher_img"][place], case["teacher_text"][text]
        image, vector, sentence = (torch.from_numpy(a).to(dtype).chunk(micros)[micro] for a in arrays)
        rows = torch.arange(size).chunk(micros)[micro]
        return Batch({"image": image}, rows, epoch=epoch, micro=micro, extra={IMAGE: vector, TEXT: sentence})

    share = micros // comm.world
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for step in range(method.steps):
        stand_in: Any = SimpleNamespace(
            engine=engine, comm=comm, method=method, batch=partial(batch, *divmod(step, per_epoch)),
            targets=partial(method.targets, {}), seed_network=lambda step, micro: None,
        )  # fmt: skip
        own: Any = range(comm.rank * share, (comm.rank + 1) * share)
        loss, report = coupled.backward(stand_in, step, own)
        engine.step(partial(method.lr, step))
        values = (loss, *(report[f"loss/{name}"] for name in ("vl", "pvl", "udist")), method.lr(step, 1.0))
        for name, value in zip(COLUMNS, values, strict=True):
            found[name].append(float(value))
    return {name: np.array(values) for name, values in found.items()} | _final(case, engine, comm)


def _build(case: Arrays, per_epoch: int, size: int, micro: int) -> tuple[DimeFm, nn.Module, nn.Module]:
    state, side = to_timm(_params(case, "init/", torch.float32)), case["images"].shape[-1]
    swin = any(name.startswith("layers.") for name in state)
    heads = {"heads": [max(1, state["cls_token"].shape[-1] // 64)]} if not swin else swin_sizes(state)
    if "heads" in case:
        heads["heads"] = np.ravel(case["heads"]).tolist()
    student = network(state, swin=swin, **heads | {"size": side})
    vl, pvl, udist = (float(w) for w in case["weights"])
    flags = [bool(flag) for flag in case["flags_pvl_udist"]]
    temps = dict(zip(("t_vl", "t_pvl", "t_udist"), case["temps"].tolist(), strict=True))
    options = DimeFmOptions(
        vl=vl, pvl=pvl * flags[0], udist=udist * flags[1], warmup_lr=float(case["warmup_lr"]), **temps
    )
    beta1, beta2 = case["betas"].tolist()
    settings = Train(
        batch=size, micro_batch=micro, img_size=side, lr=float(case["base_lr"]), lr_batch=0, betas=(beta1, beta2),
        min_lr=float(case["min_lr"]), warmup_steps=math.floor(float(case["warmup_epochs"]) * per_epoch), clip=0.0,
        weight_decay=float(case["weight_decay"]), eps=float(case["eps"]), precision="fp32",
    )  # fmt: skip
    method = DimeFm(options, settings, int(case["epochs"]) * per_epoch)
    info = describe(student, SWIN if swin else VIT, side, "student")
    method.check(info, {})
    return method, method.build(student, info, {}), student


def _params(case: Arrays, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v).to(dtype) for k, v in case.items() if k.startswith(prefix)}


def _final(case: Arrays, engine: Engine | PlainEngine, comm: Comm) -> Arrays:
    """Every parameter under its upstream name and in its upstream shape, put together from all ranks' fragments."""
    full = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in engine.shapes.items()}
    for f in engine.fragments():
        full[f.name][f.start : f.start + f.numel] = f.view("weight").double() / (comm.world if engine.replicated else 1)
    own = {name: comm.sum(value).view(engine.shapes[name]) for name, value in full.items()}
    out, start = {}, _params(case, "init/", torch.float64)
    for name, timm in timm_names([*start], any("relative_position_bias_table" in name for name in start)).items():
        value = own[f"encoder.{timm}"]
        turned = name.endswith(("visual.proj", "projection"))
        out[f"final/{name}"] = (value.T if turned else value.reshape(start[name].shape)).numpy()
    return out
