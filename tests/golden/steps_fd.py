"""Whole training steps of Feature-Distillation: both stages through the methods and an engine.

In float64 through `core.plain` (the runner), and in float32 through `core.engine` at every ZeRO stage (the tests).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.comm import Comm
from core.engine import Engine
from core.inputs import schedule
from core.methods.base import Batch, Method
from core.methods.fd import Fd, FdOptions
from core.methods.finetune import Finetune, FinetuneOptions
from core.models.weights import to_timm
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.networks_fd import described, in_module, layout, meta, params, student, teacher
from tests.golden.runner import Case, Check
from tests.ranks import run_ranks

TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4}  # of whole steps, from the folder's README
Arrays = dict[str, np.ndarray]


def train_steps_fd(case: Case, stage: int | None = None, world: int = 1) -> list[Check]:
    return _checks(case, _ranks(_distil, case, stage, world), stage)


def train_steps_finetune(case: Case, stage: int | None = None, world: int = 1) -> list[Check]:
    return _checks(case, _ranks(_finetune, case, stage, world), stage)


def _ranks(run: Any, case: Case, stage: int | None, world: int) -> Arrays:
    if stage is None:
        return run(case, None)
    return run_ranks(run, world, case, stage)[0]


def _distil(case: Case, stage: int | None) -> Arrays:
    """One rank of the distillation. A batch is cut into as many micro-batches as there are ranks, or, where the case
    accumulates, each recorded batch is one micro-batch."""
    hp, comm = meta(case), Comm(torch.device("cpu"))
    each, every = case["batches"].shape[1], max(hp.get("accumulation", 0), 1)
    micro = each if every > 1 else each // comm.world
    settings, steps = schedule(_settings(hp, each * every, micro), hp["iters_per_epoch"] * each)
    options = FdOptions(beta=hp.get("beta", 2.0), whiten_eps=hp.get("whiten_eps", 1e-5), warmup_lr=hp["warmup_lr"],
                        accumulation=every, leftover=hp["iters_per_epoch"] % every)  # fmt: skip
    method = Fd(options, settings, steps)
    method.epoch_steps = steps // hp["epochs"]
    network = student(hp)
    info = described(network, hp["img_size"])
    known, teacher_info = teacher(params(case, "init/feature_model."), hp["teacher"], hp["img_size"], info)
    known = known.to(_dtype(stage))
    method.options.tokens = "all" if info.has_cls and teacher_info.has_cls else "patch"
    method.check(info, {"teacher": teacher_info})
    module = method.build(network, info, {"teacher": teacher_info}).to(_dtype(stage))
    state = {f"encoder.{k}": v for k, v in to_timm(params(case, "init/encoder."), layout(hp)).items()}
    state |= {f"decoder.0.{k}": v.reshape(v.shape[:2]) for k, v in params(case, "init/decoder.0.").items()}
    module.load_state_dict(state)

    def batch_of(images: Tensor, row: int, part: slice) -> Batch:
        return Batch({"image": images[part]})

    def loss_of(engine: Any, batch: Batch) -> Tensor:
        targets = method.targets({"teacher": known(batch.views["image"])}, batch)
        return method.losses(engine.forward(batch), targets, batch)[0]

    return _run(case, method, module, stage, comm, batch_of, loss_of, every)


def _finetune(case: Case, stage: int | None) -> Arrays:
    hp, comm = meta(case), Comm(torch.device("cpu"))
    each = case["batches"].shape[1]
    settings = _settings(hp, each, each if stage is None else 1)
    options = FinetuneOptions(num_classes=hp["num_classes"], layer_decay=hp["layer_decay"], warmup_lr=hp["warmup_lr"])
    method = Finetune(options, *schedule(settings, hp["iters_per_epoch"] * each))
    network = student(hp)
    module = method.build(network, described(network, hp["img_size"]), {}).to(_dtype(stage))
    module.load_state_dict({in_module(k, hp): v for k, v in params(case, "init/").items() if in_module(k, hp)})
    soft = torch.from_numpy(case["soft_targets"]).to(_dtype(stage))

    def batch_of(images: Tensor, row: int, part: slice) -> Batch:
        return Batch({"image": images[part]}, extra={"soft_targets": soft[row][part]})

    def loss_of(engine: Any, batch: Batch) -> Tensor:
        return method.losses(engine.forward(batch), method.targets({}, batch), batch)[0]

    out = _run(case, method, module, stage, comm, batch_of, loss_of, 1)
    layers = [re.fullmatch(r"layer_(\d+)_(no_decay|decay)", str(name)) for name in case["group_names"]]
    own = {(g["layer"], g["weight_decay"] > 0): g["lr_scale"] for g in method.param_groups(module)}
    scales = [own[int(m[1]), m[2] == "decay"] for m in layers]
    out["lrs"] = np.array([[method.lr(step, scale) for scale in scales] for step in range(method.steps)])
    return out


def _run(
    case: Case, method: Method, module: nn.Module, stage: int | None, comm: Comm, batch_of: Any, loss_of: Any,
    every: int,
) -> Arrays:  # fmt: skip
    """All optimiser steps of one rank: losses per recorded batch, gradient norms, rates, final weights."""
    dtype, settings = _dtype(stage), method.settings
    groups = method.param_groups(module)
    engine: Engine | PlainEngine = PlainEngine(module, groups, settings, comm, method.per_parameter_clip)
    if stage is not None:
        engine = Engine(module, groups, settings, zero_stage=stage, world=comm.world,
                        per_parameter_clip=method.per_parameter_clip, device=comm.device)  # fmt: skip
    engine.train(True)
    batches = torch.from_numpy(case["batches"]).to(dtype)
    micros = settings.batch // settings.micro_batch
    share = range(comm.rank * micros // comm.world, (comm.rank + 1) * micros // comm.world)
    iterations = meta(case)["iters_per_epoch"]
    losses, norms, rates = [], [], []
    for step in range(method.steps):
        place = step % (iterations // every)
        own = []
        for number in share:
            row = (place * every + (number if every > 1 else 0)) % len(batches)
            first = 0 if every > 1 else number * settings.micro_batch
            own.append(loss_of(engine, batch_of(batches[row], row, slice(first, first + settings.micro_batch))))
            engine.backward(own[-1])
        found = comm.gather(torch.stack([loss.detach() for loss in own])).flatten()
        losses += found.tolist() if every > 1 else [float(found.mean())]
        norms.append(_before_step(engine, module))
        rates.append(method.schedules(step)["lr"])
        engine.step(lambda scale, step=step: method.lr(step, scale))
        norms[-1] = norms[-1] if norms[-1] is not None else float(engine.ds.get_global_grad_norm())
        for row in range((place + 1) * every, iterations) if place + 1 == iterations // every else ():
            with torch.no_grad():  # computed and thrown away in the release
                losses.append(float(loss_of(engine, batch_of(batches[row % len(batches)], row, slice(None)))))
    out = {"losses": np.array(losses), "grad_norms": np.array(norms), "lrs": np.array(rates)}
    return out | {f"final.{name}": value for name, value in _final(engine, comm).items()}


def _before_step(engine: Engine | PlainEngine, module: nn.Module) -> float | None:
    """Norm over all gradients where they lie in the parameters; ZeRO tells it after its step."""
    if isinstance(engine, Engine) and not engine.replicated:
        return None
    return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


def _final(engine: Engine | PlainEngine, comm: Comm) -> Arrays:
    if isinstance(engine, PlainEngine):
        return {name: p.detach().numpy() for name, p in engine.module.named_parameters()}
    full = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for f in engine.fragments():
        full[f.name][f.start : f.start + f.numel] = f.view("weight") / (comm.world if engine.replicated else 1)
    return {name: comm.sum(flat).view(engine.shapes[name]).numpy() for name, flat in full.items()}


def _settings(hp: dict[str, Any], batch: int, micro: int) -> Train:
    betas = tuple(hp.get("betas", (0.9, 0.999)))
    return Train(batch=batch, micro_batch=micro, lr=hp["base_lr"], lr_batch=0, min_lr=hp["min_lr"],
                 epochs=hp["epochs"], warmup_epochs=hp["warmup_epochs"], weight_decay=hp["weight_decay"],
                 betas=betas, eps=hp.get("eps", 1e-8), clip=hp.get("clip_grad") or 0.0, precision="fp32")  # fmt: skip


def _dtype(stage: int | None) -> torch.dtype:
    return torch.float64 if stage is None else torch.float32


def _checks(case: Case, got: Arrays, stage: int | None) -> list[Check]:
    whole = stage is None and not any(case[name].dtype == np.float32 for name in case if name.startswith("init/"))
    tolerance = TOLERANCES[torch.float64 if whole else torch.float32]
    checks: list[Check] = [(name, got[name], case[name], tolerance) for name in ("losses", "grad_norms", "lrs")]

    hp, final = meta(case), {name.removeprefix("final."): value for name, value in got.items() if "final." in name}
    for name, want in case.below("final/").items():
        if own := in_module(name, hp):
            checks.append((f"final/{name}", final[own].reshape(want.shape), want, tolerance))
    names = [in_module(str(name), hp) for name in case["final_names"]]
    known = [i for i, name in enumerate(names) if name]
    squares = [(final[names[i]].astype(np.float64) ** 2).sum() for i in known]
    checks.append(("final_sq_norm", np.array(squares), case["final_sq_norm"][known], tolerance))
    return [*checks, ("final_names", sorted(final), sorted(names[i] for i in known), 0.0)]
