"""Whole Proteus steps: float64 through `core.plain` (the runner), float32 through `core.engine` at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.comm import Comm
from core.ema import PREFIX, Average
from core.engine import Engine
from core.methods.proteus import Proteus
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.proteus_model import TEACHER, batch_of, build, by_array, sizes, tensors
from tests.golden.recorded import left_out
from tests.golden.runner import Case, Check
from tests.golden.scale import relative
from tests.golden.towers import features_of, tower
from tests.ranks import run_ranks

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}  # of whole steps, from the folder's README


def train_steps(case: Case, stage: int | None = None, world: int = 1) -> Iterator[Check]:
    """stage: None for plain float64, else the ZeRO stage on `world` ranks."""
    dtype = torch.float64 if stage is None else torch.float32
    got = run_steps(case, None) if stage is None else run_ranks(run_steps, world, case, stage)[0]
    tol = TOLERANCES[dtype]
    student = build(case, Train())[1].student
    yield from sizes(case, student=student, teacher=_teacher(case)) if stage is None else ()
    yield relative("o/losses", got["losses"], case["o/losses"], tol)
    for group, prefix in (("w", ""), ("ema", "student.backbone.")):
        for key, name, want in by_array(case, group, prefix):
            if name in got[group] or not left_out("proteus", key, case):
                keep = slice(None) if stage is None else reproducible(name, want)
                yield relative(key, got[group][name][keep], want[keep], tol)


def reproducible(name: str, value: Tensor) -> slice | list[int]:
    """Entries that float32 can reproduce: a bias on the keys has gradient zero and in float32 rounding noise, which
    Adam normalises to steps of full size."""
    third = len(value) // 3
    return [*range(third), *range(2 * third, len(value))] if name.endswith("attn.qkv.bias") else slice(None)


def micro_batches(case: Case, count: int) -> list[list[list[int]]]:
    """By step, rows of `count` micro-batches with equally many masked patches: their mean is the whole batch's loss."""
    out = []
    for step in range(int(case["nsteps"])):
        masked = case[f"masks_{step}"].sum(1)
        rows = np.argsort(-masked, kind="stable")
        parts = [sorted(rows[i::count].tolist()) for i in range(count)]
        assert len({int(masked[part].sum()) for part in parts}) == 1, "the masks cannot be shared out equally"
        out.append(parts)
    return out


def run_steps(case: Case, stage: int | None) -> dict[str, Any]:
    """One rank: all steps of the case at a ZeRO stage, or (None) in plain float64."""
    comm = Comm(torch.device("cpu"))
    method, engine = _engine(case, stage, comm)
    dtype = torch.float64 if stage is None else torch.float32
    teacher = _teacher(case).to(dtype)
    normed = not isinstance(teacher.norm_pre, nn.LayerNorm)  # as CLIP's tower hands its patches on
    average = Average(build(case, method.settings, method.steps)[1].to(dtype), engine, dtype)
    losses: list[Tensor] = []
    for step, parts in enumerate(micro_batches(case, comm.world)):
        batch = batch_of(case[f"images_{step}"], case[f"masks_{step}"], parts[comm.rank])
        batch.views["image"] = batch.views["image"].to(dtype)
        features = {TEACHER: features_of(teacher, batch.views["image"], normed=normed)}
        loss, report = method.losses(engine.forward(batch), method.targets(features, batch), batch)
        engine.backward(loss)
        engine.step(_rate(float(case["lrs"][step])))
        terms = [report[f"loss/{kind}_{TEACHER}"] for kind in ("patch", "token", "feature")]
        losses.append(comm.mean(torch.stack([loss.detach().to(dtype), *(t.to(dtype) for t in terms)])))
        average.update(float(case["ema_decay"]))
    averaged = {name.removeprefix(PREFIX): value for name, value in average.state().items()}
    found = {"w": _weights(engine, comm), "ema": averaged}
    arrays = {group: {name: value.numpy() for name, value in named.items()} for group, named in found.items()}
    return {"losses": torch.stack(losses).numpy(), **arrays}


def _teacher(case: Case) -> VisionTransformer:
    return tower(tensors(case, "p/teacher.backbone."), int(case["teacher_heads"]))


def _rate(lr: float) -> Any:
    return lambda scale: lr * scale


def _engine(case: Case, stage: int | None, comm: Comm) -> tuple[Proteus, Engine | PlainEngine]:
    count = len(case["images_0"])
    betas = tuple(float(b) for b in case["betas"])
    settings = Train(batch=count, micro_batch=count // comm.world, weight_decay=float(case["weight_decay"]),
                     betas=betas, eps=float(case["eps"]), clip=max(0.0, float(case["clip_grad"])),
                     precision="fp32")  # fmt: skip
    method, module = build(case, settings, int(case["nsteps"]))
    module = module.to(torch.float64 if stage is None else torch.float32)
    groups, clip = method.param_groups(module), method.per_parameter_clip
    if stage is None:
        return method, PlainEngine(module, groups, settings, comm, clip)
    engine = Engine(module, groups, settings, zero_stage=stage, world=comm.world, per_parameter_clip=clip,
                    device=comm.device)  # fmt: skip
    engine.train(True)
    return method, engine


def _weights(engine: Engine | PlainEngine, comm: Comm) -> dict[str, Tensor]:
    """Every parameter, put together from all ranks' fragments."""
    if isinstance(engine, PlainEngine):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    full = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for f in engine.fragments():
        full[f.name][f.start : f.start + f.numel] = f.view("weight") / (comm.world if engine.replicated else 1)
    return {n: comm.sum(t).view(engine.shapes[n]) for n, t in full.items()} | engine.frozen
