"""Units of the Proteus cases: towers, objective, masks, samplers, groups and schedules of the method."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.comm import Comm
from core.config import load
from core.data.masks import mask_counts, masked_samples, most_masked, place_masks, ratio_bins
from core.data.repeated import released_repeats
from core.data.sharded import sharded_indices
from core.ema import average_
from core.evaluate.last_layers import last_layers
from core.inputs import schedule
from core.methods.base import Batch, Info
from core.methods.proteus import Proteus, ProteusOptions
from core.models import vit as vits
from core.models.adapters import KINDS, MaskedStudent
from core.models.features import last_tokens
from core.models.teachers import FrozenTeacher
from core.models.weights import to_timm
from core.plain import PlainEngine
from core.recipe import Teacher, Train
from core.schedules import late_epoch, unshifted_cosine
from tests.golden import proteus_evaluation as evaluation
from tests.golden.networks import tensor
from tests.golden.proteus_model import TEACHER, batch_of, build, by_array, in_product, sizes, tensors
from tests.golden.proteus_steps import train_steps
from tests.golden.runner import Case, Check, Unit
from tests.golden.scale import relative
from tests.golden.towers import features_of, gated, info_of, layout_of, tower

Checks = Iterator[Check]
LOSSES = {"token": "token_loss", "feature": "fea_loss", "patch": "patch_loss"}


# -- towers ---------------------------------------------------------------------------------------------------------


def backbone(case: Case) -> Checks:
    state = tensors(case, "p/")
    model, x = tower(state, int(case["heads"])).eval(), tensor(case["x"])
    clip = layout_of(state) == "clip"
    count = sum(key.startswith("inter_cls_") for key in case)
    with torch.no_grad():
        features, raw = features_of(model, x, normed=not clip), last_tokens(model, x)
        layers = last_layers(model, x, count)
    prefix = model.num_prefix_tokens
    yield "patch", model.patch_embed.patch_size[0], int(case["patch"]), 0.0
    if "ffn" in case:
        yield "ffn", "swiglu" if gated(model) else "mlp", str(case["ffn"])[:6], 0.0
    native = tuple(model.patch_embed.img_size) == x.shape[-2:]

    def tol(name: str) -> float:
        """Masked towers were recorded in float64; interpolation and float32 records leave less."""
        exact = "mask" in case and native and case[name].dtype == np.float64
        return 5e-6 if clip else 1e-9 if exact else 2e-6

    yield relative("cls", features.cls, case["cls"], tol("cls"))
    yield relative("patch_tokens", features.patch, case["patch_tokens"], tol("patch_tokens"))
    if "prenorm" in case:
        yield relative("prenorm", raw, case["prenorm"], tol("prenorm"))
    for i, tokens in enumerate(layers):
        yield relative(f"inter_cls_{i}", tokens[:, 0], case[f"inter_cls_{i}"], tol(f"inter_cls_{i}"))
        name = f"inter_patchmean_{i}"
        yield relative(name, tokens[:, prefix:].mean(1), case[name], tol(name))
    if "mask" in case:
        yield from _masked(case, model, state, tol)


def _masked(case: Case, model: Any, state: dict[str, Tensor], tol: Callable[[str], float]) -> Checks:
    """Every masked token of the whole batch, by asking for all positions of all samples."""
    marks = case["mask"]
    student = MaskedStudent(model, model.embed_dim, {}, ("patch",)).double()
    student.mask_token.data = state["mask_token"].reshape(1, -1)
    images = tensor(case["x"])
    extra = {
        "mask": torch.from_numpy(marks),
        "mask_rows": torch.arange(len(marks)),
        "mask_at": torch.arange(marks.size),
    }
    with torch.no_grad():
        patch = student.tokens(Batch({"image": images}, extra=extra))["patch"]
        x = vits.embed_patches(model, images)
        hidden = torch.cat([x[0], student.hide(x[0], Batch({}, extra=extra))])
        out = model.norm(student.run(hidden, x[1]))[len(marks) :, 0]
    want = case["patch_tokens_masked"]
    yield relative("patch_tokens_masked", patch.view(want.shape), want, tol("patch_tokens_masked"))
    yield relative("cls_masked", out, case["cls_masked"], tol("cls_masked"))


def pos_interp(case: Case) -> Checks:
    table, side, patch = torch.from_numpy(np.array(case["pos_embed"])), int(case["native_grid"]), int(case["patch"])
    for key in (key for key in case if re.fullmatch(r"out_\d+x\d+", key)):
        grid = tuple(int(n) // patch for n in key.removeprefix("out_").split("x"))
        prefix = table.shape[1] - side * side
        got = vits.resize_pos_embed(table, (side, side), grid, prefix, float(case["offset"]))
        yield relative(key, got, case[key], 5e-6)


# -- objective ------------------------------------------------------------------------------------------------------


def loss(case: Case) -> Checks:
    """The objective with the recorded weights; heads whose term has weight 0 are made only to compare their outputs."""
    method, module = build(case, Train())
    batch = batch_of(case["images"], case["masks"])
    yield "mask_indices", np.flatnonzero(case["masks"]), case["mask_indices"], 0.0
    state = tensors(case, "p/teacher.backbone.")
    clip = layout_of(state) == "clip"
    teacher = tower(state, int(case["teacher_heads"]))
    features = features_of(teacher, batch.views["image"], normed=not clip)
    yield relative("o/teacher_cls", features.cls, case["o/teacher_cls"], 2e-6)
    yield relative("o/teacher_patch", features.patch, case["o/teacher_patch"], 2e-6)
    yield from sizes(case, student=module.student, teacher=teacher)
    total, report = method.losses(module(batch), method.targets({TEACHER: features}, batch), batch)
    total.backward()
    exact = 2e-6 if clip else 1e-7
    yield relative("o/loss", total, case["o/loss"], exact)
    for kind, name in LOSSES.items():
        yield relative(f"o/{name}", report[f"loss/{kind}_{TEACHER}"], case[f"o/{name}"], exact)
    yield from _gradients(case, module)
    yield from _outputs(case, batch)


def _outputs(case: Case, batch: Batch) -> Checks:
    """What the student and every head give; of masked patches those rows that a loss can see."""
    module = build(case, Train(), all_heads=True)[1]
    with torch.no_grad():
        tokens, outputs = module.tokens(batch), module(batch)[TEACHER]
    names = {"o/student_cls": tokens["token"], "o/student_patch": tokens.get("feature"),
             "o/patch_head": outputs.get("patch"), "o/token_head": outputs["token"],
             "o/fea_head": outputs.get("feature")}  # fmt: skip
    for name, got in names.items():
        if name in case:
            yield relative(name, got, case[name], 2e-6)
    if "o/student_masked_patch" in case:
        want = case["o/student_masked_patch"][np.asarray(case["masks"])]
        yield relative("o/student_masked_patch", tokens["patch"], want, 2e-6)


def _gradients(case: Case, module: MaskedStudent) -> Checks:
    """Of all parameters that the release gives one; where the product has no such parameter, it is zero."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    wanted = [*by_array(case, "g")]
    without = in_product(dict.fromkeys((str(n) for n in case["no_grad_names"] if n), torch.zeros(1)))
    yield "names of gradients", sorted(grads.keys() - without.keys() - {name for _, name, _ in wanted}), [], 0.0
    for key, name, want in wanted:
        yield relative(key, grads.get(name, torch.zeros_like(want)), want, 2e-6)
    reached = [name for name, p in module.named_parameters() if name in without and p.grad is not None]
    yield "no_grad_names", reached, [], 0.0


# -- masks and samplers ---------------------------------------------------------------------------------------------


def collate(case: Case) -> Checks:
    """The draws are those of upstream: numpy's legacy shuffle for places, Python's for ratios and samples."""
    count, places = int(case["B"]), int(case["grid"]) ** 2
    ratio, first = [float(r) for r in np.atleast_1d(case["mask_ratio"])], bool(case["mask_first_n"])
    n = masked_samples(count, float(case["mask_probability"]))
    edges, python = ratio_bins(n, ratio), random.Random(int(case["python_seed"]))
    u_n = (
        np.array([low + (high - low) * np.float32(python.random()) for low, high in pairwise(edges)])
        if len(ratio) == 2
        else None
    )
    if "u" in case:
        yield "u", u_n, case["u"], 1e-12
    counts = mask_counts(n, places, ratio, u_n)
    numpy_random = np.random.RandomState(int(case["numpy_seed"]))
    marked = np.zeros((n, places), np.bool_)
    for row, masked in zip(marked, counts, strict=True):
        shuffled = np.hstack([np.ones(masked), np.zeros(places - masked)])
        numpy_random.shuffle(shuffled)
        row[:] = shuffled > 0
    order = list(range(count))
    if not first:
        python.shuffle(order)
    got = place_masks(marked, count, None if first else np.array(order))
    yield "masks", got.masks, case["masks"], 0.0
    yield "mask_indices", got.index, case["mask_indices"], 0.0
    yield relative("masks_weight", got.weight, case["masks_weight"], 1e-7)
    yield "upperbound", most_masked(n, places, ratio), case["upperbound"], 0.0
    yield "n_masked", [len(got.index)], case["n_masked"], 0.0
    images, labels = (torch.from_numpy(np.array(case[f"{name}_in"])) for name in ("images", "labels"))
    options = ProteusOptions(mask_probability=float(case["mask_probability"]), mask_ratio=ratio, mask_first=first)
    method = Proteus(options, Train(batch=count, micro_batch=count), 1)
    side = int(case["grid"])
    method.check(Info("student", 1, 1, 1, (side, side), 1, True, True), {})
    batch = method.prepare(Batch({"image": images}, torch.arange(count), labels=labels))
    if len(ratio) == 1:  # of a range, its own draws decide how many
        yield "n_masked by own draws", [len(batch.extra["mask_index"])], case["n_masked"], 0.0
    yield "images_out", batch.views["image"], case["images_out"], 0.0
    yield "labels_out", batch.labels, case["labels_out"], 0.0


def ra_sampler(case: Case) -> Checks:
    length, world, repeats = (int(case[key]) for key in ("dataset_len", "world", "num_repeats"))
    for (epoch, rank), want in zip(case["epoch_rank"], case["indices"], strict=True):
        got = released_repeats(length, int(world), int(rank), int(epoch), repeats)
        yield f"indices of epoch {epoch}, rank {rank}", got.selected, want, 0.0
        yield "num_samples", got.samples, case["num_samples"], 0.0
        yield "num_selected", len(got.selected), case["num_selected"], 0.0


def sharded_sampler(case: Case) -> Checks:
    for (rank, advance), want in zip(case["rank_advance"], case["indices"], strict=True):
        got = sharded_indices(int(case["sample_count"]), int(case["world"]), int(rank), int(case["seed"]),
                              int(advance), len(want), fresh=bool(case.get("new_shuffle", False)))  # fmt: skip
        yield f"indices of rank {rank} from {advance}", got, want, 0.0


# -- optimisation ---------------------------------------------------------------------------------------------------


def param_groups(case: Case) -> Checks:
    """Names and shapes come from the product's module at the recorded sizes, groups from the method."""
    shapes = {str(name): _shape(shape) for group in ("no_decay", "decay")
              for name, shape in zip(case[group], case[f"{group}_shapes"], strict=True)}  # fmt: skip
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    own = {k.removeprefix("student.backbone."): v for k, v in state.items() if k.startswith("student.backbone.")}
    clip = layout_of(own) == "clip"
    student = tower(own, 1, load=False)
    decay = float(case["weight_decay"].max())
    betas = tuple(float(b) for b in case["betas"])
    settings = Train(weight_decay=decay, betas=betas, eps=float(case["eps"]), batch=1, micro_batch=1, precision="fp32")
    kinds = [kind for kind, head in (("token", "token_head"), ("feature", "fea_head"), ("patch", "patch_head"))
             if f"{head}.1.weight" in state]  # fmt: skip
    weights = {f"lambda_{kind}": float(kind in kinds) for kind in KINDS}
    undecayed = ["cls_token"] if clip else []  # a vector in CLIP's own layout
    method = Proteus(ProteusOptions(undecayed=undecayed, **weights), settings, 1)
    info = info_of(student, "student", student.patch_embed.img_size[0])
    teacher = Info(TEACHER, state["token_head.1.weight"].shape[0], 0, 0, info.grid, 1, True, True)
    module = method.build(student, info, {TEACHER: teacher})
    engine = PlainEngine(module, method.param_groups(module), settings, Comm(torch.device("cpu")), False)
    parameters = dict(module.named_parameters())
    grouped = dict(zip(("decay", "no_decay"), method.param_groups(module), strict=True))
    for name, group in grouped.items():
        wanted = in_product({n: state[n] for n in map(str, case[name])})
        if clip:
            wanted.pop("mask_token", None)  # never gets a gradient, so the product leaves it out
        yield name, sorted(group["names"]), sorted(wanted), 0.0
        shapes = [str(tuple(parameters[n].shape)) for n in wanted], [str(tuple(t.shape)) for t in wanted.values()]
        yield f"{name}_shapes", *shapes, 0.0
    by_decay = [group["weight_decay"] for group in engine.adam.param_groups]
    yield "weight_decay", sorted(by_decay), sorted(case["weight_decay"]), 0.0
    in_order = [grouped[name]["weight_decay"] for name in ("no_decay", "decay")]
    yield "order of weight_decay", in_order, case["weight_decay"], 0.0
    yield "betas", [g["betas"] for g in engine.adam.param_groups], [list(case["betas"])] * 2, 0.0
    yield "eps", [g["eps"] for g in engine.adam.param_groups], [float(case["eps"])] * 2, 0.0
    yield "optimizer", type(engine.adam).__name__, str(case["optimizer"]), 0.0
    yield from _frozen([str(name).removeprefix("teacher.backbone.") for name in case["frozen"]], student, info)


def _shape(text: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", str(text)))


def _frozen(names: list[str], like: Any, info: Info) -> Checks:
    """Every recorded teacher parameter is one of the product's frozen teacher, which trains none."""
    shape = {"cls_token": (1, 1, 1), "pos_embed": (1, 1, 1), "class_embedding": (1,), "positional_embedding": (1, 1)}
    state = {name: torch.empty(shape.get(name, (1,))) for name in names}
    known = to_timm(state, layout_of(state))
    depth = len({key.split(".")[1] for key in known if key.startswith("blocks.")})
    parts = {re.sub(r"^blocks\.\d+", "blocks.0", name) for name in known}
    teacher = FrozenTeacher(Teacher("teacher"), like, info, info)
    own = {n.removeprefix("model."): p.requires_grad for n, p in teacher.named_parameters()}
    yield "frozen", sorted({re.sub(r"^blocks\.\d+", "blocks.0", name) for name in own}), sorted(parts), 0.0
    yield "depth of the teacher", len(known), len({n for n in own if not re.match(r"blocks\.(?!0\.)", n)}) + (
        depth - 1) * sum(n.startswith("blocks.0.") for n in own), 0.0  # fmt: skip
    yield "gradients of the teacher", any(own.values()), False, 0.0


def lr_schedule(case: Case) -> Checks:
    epochs, batch = int(case["epochs"]), int(case["world"]) * int(case["batch_per_gpu"])
    train = dataclasses.replace(load("proteus-b").train, epochs=epochs, warmup_epochs=float(case["warmup_epochs"]),
                                lr=float(case["base_lr"]), min_lr=float(case["min_lr"]), batch=batch,
                                micro_batch=int(case["batch_per_gpu"]))  # fmt: skip
    settings, steps = schedule(train, batch)  # one step an epoch
    warmup_lr, scaled = float(case["warmup_lr"]), settings.lr * settings.lr_factor
    method = Proteus(ProteusOptions(warmup_lr=warmup_lr), settings, steps)
    yield relative("scaled_lr", scaled, case["scaled_lr"], 1e-12)
    yield relative("lr_used", [method.schedules(epoch)["lr"] for epoch in range(epochs)], case["lr_used"], 1e-12)
    if "resume_at" not in case:
        return
    resumed = int(case["resume_at"])
    curve = {"base": scaled, "final": settings.min_lr, "start": warmup_lr, "steps": epochs}
    after = [unshifted_cosine(late_epoch(epoch, resumed), warmup=settings.warmup_steps, **curve)
             for epoch in range(resumed, epochs)]  # fmt: skip
    yield relative("lr_used_after_resume", after, case["lr_used_after_resume"], 1e-12)


def ema(case: Case) -> Checks:
    average = {name: torch.from_numpy(np.array(value)) for name, value in case.below("init/").items()}
    for step in range(int(case["n"])):
        values = {name: torch.from_numpy(np.array(value)) for name, value in case.below(f"step{step}/").items()}
        average_(average, values, float(case["decay"]))
    for name, want in case.below("ema/").items():
        yield relative(f"ema/{name}", average[name], want, 1e-12)


UNITS: dict[str, Unit] = {
    "backbone": backbone,
    "pos_interp": pos_interp,
    "loss": loss,
    "collate": collate,
    "ra_sampler": ra_sampler,
    "sharded_sampler": sharded_sampler,
    "param_groups": param_groups,
    "lr_schedule": lr_schedule,
    "ema": ema,
    "train_steps": train_steps,
    **evaluation.UNITS,
}
