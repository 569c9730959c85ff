"""Units of the UDI cases: crops, networks, loss, schedules. Whole steps and evaluation live beside this package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from core.data import udi_geometry as geometry
from core.data.udi_crops import Linking
from core.inputs import schedule
from core.losses_udi import LEVELS, NAMES, combine, udi_loss
from core.methods.udi import Udi, UdiOptions
from core.models.srs import SampledAttention, dense_maps
from core.models.udi_heads import Centre, ProjectionHead
from core.recipe import Train
from tests.golden.networks import tensor
from tests.golden.runner import Case, Check, Unit, elsewhere

Checks = Iterator[Check]


def entries(case: Case) -> list[str]:
    """Prefixes cK_ of a case's numbered parts."""
    return [f"c{k}_" for k in range(int(case["n"]))]


# ---- crops


def crop_params(case: Case) -> Checks:
    attempts, sizes = case["attempts"], case["size_hw"]
    ratio = (float(case["ratio"][0]), float(case["ratio"][1]))
    shape, fitted = geometry.fitting_boxes(attempts[..., 0], attempts[..., 1], sizes, ratio)
    yield "fitted", fitted, case["ij_draw"][:, 0] >= 0, 0.0
    drawn = (case["ij_draw"] + 0.5) / (sizes - shape + 1)  # the middle of the draws that give this corner
    boxes = geometry.placed(shape, fitted, sizes, drawn)
    if "ref" in case:
        boxes = geometry.pull(boxes, case["ref"], sizes, released_slip=True)
    yield "box_ijhw", boxes, case["box_ijhw"], 0.0
    yield "coord", geometry.corners(boxes, sizes), case["coord"], 1e-6


def crop_union_quirk(case: Case) -> Checks:
    yield "out", geometry.reference(case["a"], case["b"]), case["out"], 0.0
    yield "unflip_a", geometry.upright(case["a"]), case["unflip_a"], 0.0


def srs_mask(case: Case) -> Checks:
    for c in entries(case):
        grid, window = (int(v) for v in case[f"{c}cfg"])
        tokens = geometry.stratified(case[f"{c}sel"][None], np.array([float(case[f"{c}corner_u"])]), grid, window)
        mask = np.zeros(grid * grid, bool)
        mask[tokens[0]] = True
        yield f"{c}mask", mask, case[f"{c}mask"].reshape(-1), 0.0


def densified(found: geometry.Matches, grid: int, target_grid: int) -> tuple[Tensor, Tensor]:
    """Source and target maps (B, s, tokens)."""
    index, valid = torch.from_numpy(found.source)[..., None], torch.from_numpy(found.valid)[..., None]
    target = dense_maps(torch.from_numpy(found.target), torch.from_numpy(found.weight), target_grid**2)
    return dense_maps(index, valid, grid**2), target


def create_map(case: Case) -> Checks:
    for c in entries(case):
        grid = int(case["grid_local" if bool(case[f"{c}local"]) else "grid_global"])
        tokens = np.flatnonzero(case[f"{c}mask"])[None]
        found = geometry.match(case[f"{c}src"][None], case[f"{c}tgt"][None], tokens, grid, int(case["grid_global"]))
        source, target = densified(found, grid, int(case["grid_global"]))
        yield f"{c}src_map", source[0], case[f"{c}src_map"], 2e-5
        yield f"{c}tgt_map", target[0], case[f"{c}tgt_map"], 2e-5


def views_geometry(case: Case) -> Checks:
    boxes, flips, count = case["boxes_ijhw"], case["flip_vh"], int(case["n_local"])
    sizes = np.tile(case["size_hw"], (len(boxes), 1))
    edges = geometry.corners(boxes, sizes, flips)
    yield "coords", edges, case["coords"], 2e-5
    yield "ref_local", geometry.reference(edges[:1], edges[1:2])[0], case["ref_local"], 2e-5
    grid, local_grid = (int(case[f"{name}_size"]) // int(case["patch"]) for name in ("global", "local"))
    tokens, local_tokens = (np.flatnonzero(case[f"sample_{name}"])[None] for name in ("global", "local"))
    sampled = [geometry.windows(g, int(case[f"win_{w}"])) ** 2 for g, w in ((grid, "g"), (local_grid, "l"))]
    yield "samples", [tokens.shape[1], local_tokens.shape[1]], sampled, 0.0
    link = Linking(grid, local_grid)
    large = [densified(found, grid, grid) for found in link.large(edges[:1], edges[1:2], tokens)]
    yield "src_maps_global", torch.cat([source for source, _ in large]), case["src_maps_global"], 2e-5
    yield "tgt_maps_global", torch.cat([target for _, target in large]), case["tgt_maps_global"], 2e-5
    small = [
        [densified(found, local_grid, grid) for found in link.small(edge[None], edges[:1], edges[1:2], local_tokens)]
        for edge in edges[2 : 2 + count]
    ]
    sources = [pair[way][0] for way in (0, 1) for pair in small]  # upstream: all of one way, then all of the other
    targets = [target for pair in small for _, target in pair]
    if small:
        yield "src_maps_local", torch.cat(sources), case["src_maps_local"], 2e-5
        yield "tgt_maps_local", torch.cat(targets), case["tgt_maps_local"], 2e-5


# ---- networks


def srs_attention(case: Case) -> Checks:
    x, maps = tensor(case["x"]).requires_grad_(), tensor(case["map"])
    attention = SampledAttention(x.shape[-1], int(case["num_heads"]), bool(case["skip_connection"])).double()
    attention.load_state_dict({name: tensor(array) for name, array in case.below("param/").items()}, strict=True)
    several, count = maps.shape[0], maps.shape[2]
    flat = maps.transpose(0, 1).flatten(1, 2)  # (B, m s, N)
    out = attention(x, flat).unflatten(1, (several, count)).transpose(0, 1)
    (out * tensor(case["loss_weight"])).sum().backward()
    yield "out", out, case["out"], 1e-8
    seen = attention.attention(x, flat).unflatten(2, (several, count)).permute(2, 0, 1, 3, 4)
    yield "attn", seen, case["attn"], 1e-8
    yield "grad_x", x.grad, case["grad_x"], 1e-8
    for name, parameter in attention.named_parameters():
        yield f"grad/{name}", parameter.grad, case[f"grad/{name}"], 1e-8


def head(case: Case) -> Checks:
    params = {name: tensor(array) for name, array in case.below("param/").items()}
    module = projection_head(params, not bool(case["norm_last_layer"])).double()
    module.load_state_dict(params, strict=True)
    x = tensor(case["x"]).requires_grad_()
    y = module(x)
    (y * tensor(case["loss_weight"])).sum().backward()
    yield "y", y, case["y"], 1e-8
    yield "grad_x", x.grad, case["grad_x"], 1e-8
    for name, parameter in module.named_parameters():
        yield f"requires_grad/{name}", parameter.requires_grad, case[f"requires_grad/{name}"], 0.0
        if f"grad/{name}" in case:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield f"grad/{name}", grad, case[f"grad/{name}"], 1e-8


def projection_head(state: Mapping[str, Tensor], train_gain: bool) -> ProjectionHead:
    """Of a released state dict's sizes; a head of one layer has it under `mlp` itself."""
    layers = [value for name, value in state.items() if re.fullmatch(r"mlp(\.\d+)?\.weight", name)]
    (hidden, dim), (out, bottleneck) = layers[0].shape, state["last_layer.weight_v"].shape
    return ProjectionHead(dim, hidden, bottleneck, out, train_gain, len(layers))


# ---- loss


def loss(case: Case) -> Checks:
    centre = _centre(case)
    yield "K", centre.center.shape[-1], case["K"], 0.0
    count, batch = int(case["n_local"]), int(case["batch"])
    mixed, patch = int(case["num_cls"]) > 1, bool(case["include_patch"])
    levels = [level for level in LEVELS if level == "cls" or (mixed if level == "mixed" else patch)]
    for step in range(int(case["steps"])):
        at = f"s{step}/"
        given = {key: tensor(case[key]).requires_grad_() for key in case
                 if key.startswith(f"{at}student_") and not key.endswith("mask")}  # fmt: skip
        student = {}
        for i, level in enumerate(levels):
            rows = given[f"{at}student_g{i}"]
            student[level] = rows.unflatten(1, (2, batch))[0] if level == "patch" else rows.view(2, batch, -1)
            if count and f"{at}student_l{i}" in given:
                student[f"local_{level}"] = given[f"{at}student_l{i}"].view(count, batch, -1)
        index = len(levels) - 1
        rows = _teacher(case, at, f"g{index}", f"l{index}", "teacher_mask_", patch, mixed)
        valid = tensor(case[f"{at}student_mask"]).view(2, batch, -1) if patch else None
        value, parts = udi_loss(student, rows, valid, centre.center, temperature=float(case["temp"]),
                                student_temperature=float(case["student_temp"]), weights=case["weights"])  # fmt: skip
        value.backward()
        yield f"{at}loss", value, case[f"{at}loss"], 1e-6
        for kind in ("global", "local"):
            own = [float(parts.get(f"{kind[0]}_{NAMES[level]}", -1.0)) for level in levels]
            yield f"{at}parts_{kind}", own, case[f"{at}parts_{kind}"], 1e-6
        for key, leaf in given.items():
            name = f"{at}grad_{key.removeprefix(f'{at}student_')}"
            if name in case:
                yield name, leaf.grad, case[name], 1e-6
        centre.update(rows["means"][None], float(case["center_momentum"]))
        yield f"{at}center", centre.center.clone(), case[f"{at}center"], 1e-6


def _centre(case: Case) -> Centre:
    start = tensor(case["center_init"])
    centre = Centre(*start.shape).double()
    centre.center.copy_(start)
    return centre


def _teacher(
    case: Case, at: str, patch_name: str, local_name: str, masks: str, patch: bool, mixed: bool
) -> dict[str, Tensor]:
    """Logits of the teacher: the last layer is linear, so they may be combined like bottlenecks."""
    batch, count = int(case["batch"]), int(case["n_local"])
    cls = tensor(case[f"{at}teacher_g0"]).view(2, batch, -1)
    if not patch:
        return combine(cls, None, None, None, None, float(case.get("alpha", 0.0)))
    positions = tensor(case[f"{at}teacher_{patch_name}"])[0].unflatten(0, (2, batch))
    weight = tensor(case[f"{at}{masks}g"]).view(2, batch, -1)
    if not count:
        return combine(cls, positions, None, weight, None, float(case["alpha"]), mixed)
    local = tensor(case[f"{at}teacher_{local_name}"]).unflatten(1, (2, batch))
    w_local = tensor(case[f"{at}{masks}l"]).view(count, 2, batch, -1)
    return combine(cls, positions, local, weight, w_local, float(case["alpha"]), mixed)


def center(case: Case) -> Checks:
    """Levels by number: class token, then patches, with the second class token between them."""
    centre = _centre(case)
    last = len(case["center_init"]) - 1
    means = [_teacher(case, f"r{rank}/", f"g{last}", f"l{last}", "mask_", last > 0, last > 1)["means"]
             for rank in range(int(case["world"]))]  # fmt: skip
    centre.update(torch.stack(means), float(case["center_momentum"]))
    yield "center", centre.center, case["center"], 1e-6


# ---- schedules


def schedules(case: Case) -> Checks:
    if "hp_lr" not in case:
        yield from schedules_finetune(case)
        return
    hp = {name: float(value) for name, value in case.below("hp_").items()}
    batch, epochs = int(hp["global_batch"]), int(hp["epochs"])
    settings = Train(batch=batch, micro_batch=batch, lr=hp["lr"], lr_batch=256, min_lr=hp["min_lr"], epochs=epochs,
                     warmup_epochs=hp["warmup_epochs"], weight_decay=hp["wd"])  # fmt: skip
    options = UdiOptions(momentum=hp["momentum"], weight_decay_end=hp["wd_end"],
                         temperature=(hp["warmup_temp"], hp["temp"]),
                         temperature_epochs=int(hp["warmup_temp_epochs"]), out=1)  # fmt: skip
    method = Udi(options, *schedule(settings, int(hp["niter"]) * batch))
    values = [method.schedules(step) for step in range(method.steps)]
    for name, own in (("lr", "lr"), ("wd", "weight_decay"), ("momentum", "teacher_momentum")):
        yield name, [value[own] for value in values], case[name], 1e-10
    yield "temp", [method.temperature(epoch) for epoch in range(epochs)], case["temp"], 1e-10


def schedules_finetune(case: Case) -> Checks:
    for name in sorted(key.removesuffix("_args") for key in case if key.endswith("_args")):
        base, final, epochs, per_epoch, warmup_epochs, warmup_steps = (float(v) for v in case[f"{name}_args"])
        settings = Train(batch=1, micro_batch=1, lr=base, lr_batch=0, min_lr=final, epochs=int(epochs),
                         warmup_epochs=warmup_epochs, warmup_steps=int(warmup_steps) or -1)  # fmt: skip
        method = Udi(UdiOptions(out=1), *schedule(settings, int(per_epoch)))
        yield name, [method.schedules(step)["lr"] for step in range(method.steps)], case[name], 1e-10


UNITS: dict[str, Unit] = {
    "crop_params": crop_params,
    "crop_ref": crop_params,
    "crop_union": crop_union_quirk,
    "srs_mask": srs_mask,
    "srs_attention": srs_attention,
    "create_map": create_map,
    "views_geometry": views_geometry,
    "head": head,
    "loss": loss,
    "center": center,
    "schedules": schedules,
    "schedules_finetune": schedules_finetune,
} | {
    name: elsewhere("udi_more", unit)
    for name, unit in {
        "vit_wrapper": "vit_wrapper", "pos_interp": "pos_interp", "drop_path": "drop_path",
        "param_groups": "param_groups", "clip": "clip_per_param", "lars": "lars", "pixels": "pixels", "knn": "knn",
        "linear_probe": "linear_probe", "layer_decay": "layer_decay_ft", "attention_mask": "attention_mask",
        "davis": "davis_propagation",
    }.items()
} | {"train_step": elsewhere("udi_steps", "train_step")}  # fmt: skip
