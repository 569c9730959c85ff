"""Whole training steps of DIME-FM: the golden cases `train_steps` through the method, the coupled loss and an engine.

In float64 through `core.plain` (the runner), and in float32 through `core.engine` at every ZeRO stage (the tests), with
the batch cut into micro-batches and shared by ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from core.inputs import schedule
from core.methods.base import Batch
from core.methods.dime_fm import DimeFm
from core.models.students import describe
from core.models.weights import load_strict, to_timm
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.runner import Case, Check
from tests.golden.units.dime_fm import (
    SWIN,
    VIT,
    method_of,
    network,
    start,
    swin_sizes,
    timm_names,
    unweighed,
    vectors,
)
from tests.ranks import run_ranks

Arrays = dict[str, np.ndarray]
COLUMNS = ("total", "vl", "pvl", "udist", "lr_used")


def train_steps(case: Case) -> list[Check]:
    """The float64 run of the runner."""
    return checks(case, _run(case, None, 1), 1e-7)


def at_stage(case: Case, stage: int, ranks: int, micros: int) -> list[list[Check]]:
    """Checks of every rank, of float32 runs at a ZeRO stage with the batch in so many micro-batches."""
    return [checks(case, found, 1e-4) for found in run_ranks(_run, ranks, case, stage, micros)]


def checks(case: Case, found: Arrays, tolerance: float) -> list[Check]:
    """Rows of every step, and samples and sums of the final weights."""
    columns = [str(name) for name in case["per_step_columns"]]
    unseen = unweighed(case)  # the method computes no term without a weight, whatever its flag says
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


def _run(case: Case, zero: int | None, micros: int) -> Arrays:
    """One rank: all steps of the case. zero: stage of ZeRO, or None for plain float64; micros: parts of a batch."""
    comm, dtype = Comm(torch.device("cpu")), torch.float64 if zero is None else torch.float32
    per_epoch, size = case["images"].shape[:2]
    method, module, student = _build(case, per_epoch, size, size // micros)
    module = module.to(dtype)
    load_strict(student, {name: value.to(dtype) for name, value in start(case).items()})
    groups = method.param_groups(module)
    engine: Engine | PlainEngine = PlainEngine(module, groups, method.settings, comm, method.per_parameter_clip)
    if zero is not None:
        engine = Engine(module, groups, method.settings, zero_stage=zero, world=comm.world,
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
        own: Any = range(comm.rank * share, (comm.rank + 1) * share)
        stage = _stage(engine, comm, method, partial(batch, *divmod(step, per_epoch)))
        loss, report = coupled.backward(stage, step, own)
        engine.step(partial(method.lr, step))
        values = (loss, *(report[f"loss/{name}"] for name in ("vl", "pvl", "udist")), method.lr(step, 1.0))
        for name, value in zip(COLUMNS, values, strict=True):
            found[name].append(float(value))
    return {name: np.array(values) for name, values in found.items()} | _final(case, engine, comm)


def _stage(engine: Any, comm: Comm, method: DimeFm, batch: Callable[[int], Batch]) -> Any:
    """What the coupled loss asks of a stage."""
    return SimpleNamespace(engine=engine, comm=comm, method=method, batch=batch,
                           targets=partial(method.targets, {}), seed_network=lambda step, micro: None)  # fmt: skip


def _build(case: Case, per_epoch: int, size: int, micro: int) -> tuple[DimeFm, nn.Module, nn.Module]:
    state, side = to_timm(start(case)), case["images"].shape[-1]
    swin = any(name.startswith("layers.") for name in state)
    sizes: dict[str, Any] = swin_sizes(state) if swin else {"heads": [max(1, state["cls_token"].shape[-1] // 64)]}
    if "heads" in case:
        sizes["heads"] = np.ravel(case["heads"]).tolist()
    if "window" in case:
        sizes["window"] = int(case["window"])
    student = network(state, swin=swin, **sizes | {"size": int(case.get("resolution", side))})
    options = replace(method_of(case).options, warmup_lr=float(case["warmup_lr"]))
    beta1, beta2 = case["betas"].tolist()
    settings = Train(
        batch=size, micro_batch=micro, img_size=side, lr=float(case["base_lr"]), lr_batch=0, betas=(beta1, beta2),
        min_lr=float(case["min_lr"]), epochs=int(case["epochs"]), warmup_epochs=float(case["warmup_epochs"]), clip=0.0,
        weight_decay=float(case["weight_decay"]), eps=float(case["eps"]), precision="fp32",
    )  # fmt: skip
    method = DimeFm(options, *schedule(settings, per_epoch * size))
    info = describe(student, SWIN if swin else VIT, side, "student")
    method.check(info, {})
    return method, method.build(student, info, {}), student


def _final(case: Case, engine: Engine | PlainEngine, comm: Comm) -> Arrays:
    """Every parameter under its upstream name and in its upstream shape, put together from all ranks' fragments."""
    full = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in engine.shapes.items()}
    for f in engine.fragments():
        full[f.name][f.start : f.start + f.numel] = f.view("weight").double() / (comm.world if engine.replicated else 1)
    own = {name: comm.sum(value).view(engine.shapes[name]) for name, value in full.items()}
    out, begun = {}, start(case)
    for name, timm in timm_names([*begun], any("relative_position_bias_table" in name for name in begun)).items():
        value = own[f"encoder.{timm}"]
        turned = name.endswith(("visual.proj", "projection"))
        out[f"final/{name}"] = (value.T if turned else value.reshape(begun[name].shape)).numpy()
    return out


# ---- the loss of a batch that ranks share


def loss_global_batch(case: Case) -> Iterator[Check]:
    """The global batch shared out to ranks, through the coupled loss, and not what ranks find in their own parts."""
    world = int(case["world_size"])
    ranks = next((n for n in range(2, world + 1) if world % n == 0), 1)  # the rest as micro-batches of a rank
    answers = run_ranks(_shared_loss, ranks, case, world // ranks)
    case.read.update(*(read for _, read in answers))
    found = [results for results, _ in answers]
    for rank, own in enumerate(found):
        for name in (name for name in own if name in case):
            yield f"{name} of rank {rank}", own[name], case[name], 1e-10
    far = abs(found[0]["total"] - float(case["wrong_mean_of_local_totals"])) > 1e-6
    yield "wrong_mean_of_local_totals, avoided", bool(far), True, 0.0
    far = np.abs(found[0]["grad_student"] - np.asarray(case["wrong_local_grad"])).max() > 1e-6
    yield "wrong_local_grad, avoided", bool(far), True, 0.0


class Rows(nn.Module):
    """Vectors that are learnt themselves, in the place of a student's."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, batch: Batch) -> Tensor:
        return self.vectors[batch.index]


def _shared_loss(case: Case, micros: int) -> tuple[Arrays, set[str]]:
    """One rank, with so many micro-batches of its own; and what of the case it read."""
    comm, method, (student, image, text) = Comm(torch.device("cpu")), method_of(case), vectors(case)
    module, count, parts = Rows(student), len(student), micros * comm.world
    settings = Train(batch=count, micro_batch=count // parts, clip=0.0, precision="fp32")
    engine = PlainEngine(module, [{"params": [module.vectors], "weight_decay": 0.0}], settings, comm, False)

    def batch(micro: int) -> Batch:
        rows = torch.arange(count).chunk(parts)[micro]
        return Batch({}, rows, micro=micro, extra={IMAGE: image[rows], TEXT: text[rows]})

    own: Any = range(comm.rank * micros, (comm.rank + 1) * micros)
    total, report = coupled.backward(_stage(engine, comm, method, batch), 0, own)
    assert module.vectors.grad is not None
    found = {"total": total, "grad_student": comm.mean(module.vectors.grad)}
    found |= {name.removeprefix("loss/"): value for name, value in report.items()}
    return {name: value.numpy() for name, value in found.items()}, case.read
