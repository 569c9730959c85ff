"""Whole training steps: the golden cases `train_steps` and `ddp2_train` through the method and an engine.

In float64 through `core.plain` (the runner), and in float32 through `core.engine` at every ZeRO stage (the tests).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.comm import Comm
from core.engine import Engine
from core.inputs import schedule
from core.methods.base import Batch, Features, Info
from core.methods.unic import TOKENS, Unic, UnicOptions
from core.models.vit import set_drop_path
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.runner import Case, Check
from tests.ranks import run_ranks

UNUSED = "encoder.mask_token"  # in the release's files only
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-4}  # of whole steps, from the folder's README


class Recorded(Unic):
    """UNIC with the recorded draws of teacher dropping."""

    recorded: Tensor

    def draws(self, batch: Batch, teachers: int) -> Tensor:
        return self.recorded


def train_steps(case: Case, stage: int | None = None) -> list[Check]:
    return _checks(case, [_run(case, None)] if stage is None else _ranks(case, 1, stage), [""], _dtype(stage))


def ddp2_train(case: Case, stage: int | None = None) -> list[Check]:
    world = int(case["hp.world_size"])
    return _checks(case, _ranks(case, world, stage), [f".rank{r}" for r in range(world)], _dtype(stage))


def _ranks(case: Case, world: int, stage: int | None) -> list[dict[str, np.ndarray]]:
    found = run_ranks(_rank, world, case, stage)
    case.read.update(*(read for _, read in found))
    return [results for results, _ in found]


def _rank(case: Case, stage: int | None) -> tuple[dict[str, np.ndarray], set[str]]:
    return _run(case, stage), case.read


def _dtype(stage: int | None) -> torch.dtype:
    return torch.float64 if stage is None else torch.float32


def _run(case: Case, stage: int | None) -> dict[str, np.ndarray]:
    """One rank: all steps of the case, at a ZeRO stage or (None) in plain float64. Arrays as the case's `out.*`."""
    comm, dtype = Comm(torch.device("cpu")), _dtype(stage)
    suffix = f".rank{comm.rank}" if "hp.world_size" in case else ""
    names = [str(n) for n in case["in.teacher_order"]]
    method, module = _build(case, names, suffix, comm.world)
    groups, clip = method.param_groups(module.to(dtype)), method.per_parameter_clip
    method.stats.to(dtype)
    engine: Engine | PlainEngine = PlainEngine(module, groups, method.settings, comm, clip)
    if stage is not None:
        engine = Engine(module, groups, method.settings, zero_stage=stage, world=comm.world,
                        per_parameter_clip=clip, device=comm.device)  # fmt: skip
    engine.train(True)
    out: dict[str, list[Any]] = {"loss": [], "loss_per_image": [], "lr": [], "momentum": [], "coeff_sum": []}
    for step in range(method.steps):
        images = _tensor(case[f"in.image.{step}{suffix}"]).to(dtype)
        method.recorded = torch.from_numpy(case[f"in.u{suffix}"][step])
        features = {t: Features(*(_tensor(case[f"in.teacher.{t}.{k}.{step}{suffix}"]).to(dtype) for k in TOKENS))
                    for t in names}  # fmt: skip
        batch = Batch({"image": images}, torch.arange(len(images)), 0, 0, comm.rank)
        targets = method.targets(features, batch)
        loss, report = method.losses(engine.forward(batch), targets, batch)
        engine.backward(loss)
        values = method.schedules(step)
        engine.step(partial(method.lr, step))
        method.after_step(step, comm)
        for key, value in (("loss", loss), ("loss_per_image", report["loss_per_image"]), ("lr", values["lr"]),
                           ("momentum", values["tnorm_ema_momentum"]), ("coeff_sum", report["t_coeff"])):  # fmt: skip
            out[key].append(np.asarray(value.detach() if isinstance(value, Tensor) else value))
    results = {key: np.stack(value) for key, value in out.items()}
    for key, value in method.state().items():
        teacher, token, kind = key.replace("/", ".").split(".")
        results[f"stat.{teacher}.{token}.{kind}"] = value.numpy()
    return results | {f"final.{k}": v for k, v in _final(engine, comm).items()}


def _build(case: Case, names: list[str], suffix: str, world: int) -> tuple[Recorded, nn.Module]:
    params = {name: _tensor(array) for name, array in case.below("param.").items()}
    images = case[f"in.image.0{suffix}"]
    patch, dim, depth = int(case["hp.patch"]), params["encoder.cls_token"].shape[-1], int(case["hp.depth"])
    size = images.shape[-1]
    mlp = params["encoder.blocks.0.0.mlp.fc1.weight"].shape[0] / dim
    vit = VisionTransformer(size, patch, num_classes=0, embed_dim=dim, depth=depth, num_heads=int(case["hp.heads"]),
                            mlp_ratio=mlp)  # fmt: skip
    set_drop_path(vit, 0.0)
    grid = (size // patch, size // patch)
    info = Info("student", dim, depth, patch, grid, 1, has_cls=True, is_vit=True)
    infos = {t: Info(t, int(d), 0, patch, grid, 1, has_cls=True, is_vit=True)
             for t, d in zip(names, case["in.teacher_dims"], strict=True)}  # fmt: skip
    norms = {name: bool(_hp(case, name, 0)) for name in ("prenorm", "midnorm")}
    first = f"layers.{int(norms['prenorm'])}.weight"
    widths = [params[f"lp.heads.{names[0]}.cls.{b}.{first}"].shape[0] for b in (0, depth - 1)]
    hidden, last = (int(_hp(case, name, w)) for name, w in zip(("hidden", "last_hidden"), widths, strict=True))
    start, end = (float(m) for m in case.get("hp.momentum_start_end", (1.0, 0.001)))
    options = UnicOptions(hidden=hidden, last_hidden=last, drop=_hp(case, "t_drop_prob", 0.5), momentum=(start, end),
                          lambda_cos=_hp(case, "lam_cos", 0.5), lambda_sl1=_hp(case, "lam_sl1", 0.5),
                          **norms)  # fmt: skip
    method = Recorded(options, *_schedule(case, len(images), world))
    module = method.build(vit, info, infos)
    params.pop("encoder.mask_token", None)
    renamed = {k.replace("encoder.blocks.0.", "encoder.blocks."): v for k, v in params.items()}
    module.load_state_dict(renamed, strict=True)
    return method, module


def _schedule(case: Case, images: int, world: int) -> tuple[Train, int]:
    """Settings and steps as the product derives them from epochs and images."""
    per_epoch = int(_hp(case, "iters_per_epoch", 1))
    beta1, beta2 = (float(b) for b in case.get("hp.betas", (0.9, 0.99)))
    train = Train(batch=images * world, micro_batch=images, lr=_hp(case, "lr"), lr_batch=0, min_lr=_hp(case, "min_lr"),
                  steps=int(_hp(case, "steps", 0)), epochs=int(_hp(case, "epochs", 0)), betas=(beta1, beta2),
                  warmup_epochs=_hp(case, "warmup_epochs", 0.0), weight_decay=_hp(case, "wd"),
                  clip=_hp(case, "clip", 0.0), eps=_hp(case, "eps", 1e-8), precision="fp32")  # fmt: skip
    return schedule(train, per_epoch * train.batch)


def _final(engine: Engine | PlainEngine, comm: Comm) -> dict[str, np.ndarray]:
    """Every parameter under its released name, put together from all ranks' fragments."""
    if isinstance(engine, PlainEngine):
        own = engine.module.named_parameters()
        return {n.replace("encoder.blocks.", "encoder.blocks.0."): p.detach().numpy() for n, p in own}
    full = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for f in engine.fragments():
        full[f.name][f.start : f.start + f.numel] = f.view("weight") / (comm.world if engine.replicated else 1)
    tensors = {n: comm.sum(t).view(engine.shapes[n]) for n, t in full.items()} | engine.frozen
    return {n.replace("encoder.blocks.", "encoder.blocks.0."): t.numpy() for n, t in tensors.items()}


def _checks(case: Case, ranks: list[dict[str, np.ndarray]], suffixes: list[str], dtype: torch.dtype) -> list[Check]:
    checks: list[Check] = []
    tolerance = TOLERANCES[dtype]
    for key in (key for key in case if key.startswith("out.") and key != f"out.final.{UNUSED}"):
        name, want = key.removeprefix("out."), case[key]
        rank = next((r for r, suffix in enumerate(suffixes) if suffix and name.endswith(suffix)), 0)
        name = name.removesuffix(suffixes[rank]) if suffixes[rank] else name
        got = ranks[rank]
        if name in ("final_sum", "final_sumsq", "final_names"):
            names = [str(n) for n in case["out.final_names"]]
            kept = [i for i, n in enumerate(names) if n != UNUSED]
            checks.append((key, _summary(name, got, [names[i] for i in kept]), want[kept], tolerance))
        elif name.startswith("stat."):
            checks.append((key, got[name].reshape(want.shape), want, tolerance))
        else:
            checks.append((key, got.get(name, np.array(np.nan)), want, tolerance))  # without an answer it fails
    return checks


def _summary(kind: str, got: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Names of all final parameters in the order given, or sums of their values or squares."""
    own = [name for name in names if f"final.{name}" in got]
    more = sorted({name.removeprefix("final.") for name in got if name.startswith("final.")} - set(own))
    if kind == "final_names":
        return np.array([*own, *more])
    power = 2 if kind.endswith("sq") else 1
    return np.array([(got[f"final.{name}"].astype(np.float64) ** power).sum() for name in own])


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32).copy())


def _hp(case: Case, name: str, default: float | None = None) -> float:
    value = case.get(f"hp.{name}", default)
    assert value is not None, f"the case lacks hp.{name}"
    return float(value)
