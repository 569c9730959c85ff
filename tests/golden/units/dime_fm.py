"""Units of the DIME-FM cases: losses, schedule, parameter groups, networks and text; data and evaluation beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.losses_pairs import Weights, cosine_scores, score_losses
from core.models.students import create
from core.models.text import pool_position, tokenize
from core.models.weights import load_strict, to_timm
from core.optim import decay_groups
from core.schedules import unshifted_cosine
from tests.golden.networks import tensor
from tests.golden.runner import Case, Check, Unit, elsewhere

Checks = Iterator[Check]
VIT, SWIN = "vit_base_patch32_clip_quickgelu_224", "swin_tiny_patch4_window7_224"
FULL = {"vit_b32": VIT, "vit_b16": "vit_base_patch16_clip_quickgelu_224", "swin_t": SWIN,
        "swin_s": "swin_small_patch4_window7_224", "swin_b": "swin_base_patch4_window7_224"}  # fmt: skip


def losses(case: Case) -> Checks:
    """In the precision of the arrays."""
    tolerance = 2e-5 if case["student_img"].dtype == np.float32 else 1e-10
    student, image, text = (torch.from_numpy(case[k]) for k in ("student_img", "teacher_img", "teacher_text"))
    student.requires_grad_()
    pvl, udist = (bool(flag) for flag in case["flags_pvl_udist"])
    weights = Weights(*(float(x) for x in (*case["weights"], *case["temps"])))
    total, terms = score_losses(student, image, text, weights, pvl, udist)
    total.backward()
    yield "total", total, case["total"], tolerance
    for name, term in terms.items():
        yield name, term, case[name], tolerance
    if "grad_student" in case:
        yield "grad_student", student.grad, case["grad_student"], tolerance


def loss_flags(case: Case) -> Checks:
    columns = [str(name) for name in case["columns"]]
    for number, values in enumerate(case["table"]):
        row = dict(zip(columns, values.tolist(), strict=True))
        student, image, text = (tensor(case[k]) for k in ("student_img", "teacher_img", "teacher_text"))
        student.requires_grad_()
        weights = Weights(row["w_vl"], row["w_pvl"], row["w_udist"], *case["temps"].tolist())
        total, terms = score_losses(student, image, text, weights, bool(row["use_pvl"]), bool(row["use_udist"]))
        total.backward()
        assert student.grad is not None
        found = {**terms, "total": total, "abs_grad_sum": student.grad.abs().sum()}
        for name, value in found.items():
            yield f"{name}.{number}", value, row[name], 1e-10


def loss_global_batch(case: Case) -> Checks:
    """The whole batch at once, and neither of the two answers of ranks that look at their own part alone."""
    checks = {name: (got, want, tol) for name, got, want, tol in losses(case)}
    yield from ((name, *check) for name, check in checks.items())
    total, slope = checks["total"][0], checks["grad_student"][0]
    yield (
        "not the mean of local totals",
        abs(total.item() - float(case["wrong_mean_of_local_totals"])) > 1e-6,
        True,
        0.0,
    )
    yield "not the local gradient", bool((slope - tensor(case["wrong_local_grad"])).abs().max() > 1e-6), True, 0.0


def logits(case: Case) -> Checks:
    scores = cosine_scores(tensor(case["x1"]), tensor(case["x2"]))
    yield "logits_per_x1", scores, case["logits_per_x1"], 1e-11
    yield "logits_per_x2", scores.T, case["logits_per_x2"], 1e-11


def lr_schedule(case: Case) -> Checks:
    from core.methods.dime_fm import late_step

    per_epoch = int(case["n_iter"])
    steps, warmup = int(case["epochs"]) * per_epoch, int(float(case["warmup_epochs"]) * per_epoch)
    rates = {"base": float(case["base_lr"]), "final": float(case["min_lr"]), "start": float(case["warmup_lr"])}

    def lr(step: int) -> float:
        return unshifted_cosine(step, steps=steps, warmup=warmup, **rates)

    past = case["lr_function_past_end"]
    yield "lr_function", [lr(k) for k in range(len(case["lr_function"]))], case["lr_function"], 1e-15
    yield "lr_function_past_end", [lr(steps + k) for k in range(len(past))], past, 1e-15
    used = case["lr_used_at_step"]
    yield "lr_used_at_step", [lr(late_step(k)) for k in range(len(used))], used, 1e-15
    groups = decay_groups([], float(case["weight_decay_by_group"][0]))
    yield "weight_decay_by_group", [g["weight_decay"] for g in groups], case["weight_decay_by_group"], 0.0


def network(
    state: dict[str, Tensor], *, swin: bool, heads: list[int], size: int, window: int = 7, **more: float
) -> nn.Module:
    """The product's student at the sizes of timm weights; more: further arguments of it."""
    if swin:
        stages = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
        depths = [len({k.split(".")[3] for k in state if k.startswith(f"layers.{s}.blocks.")}) for s in stages]
        args = {"embed_dim": state["patch_embed.proj.weight"].shape[0], "depths": depths, "num_heads": heads,
                "window_size": window, "drop_path_rate": 0.0, "patch_size": state["patch_embed.proj.weight"].shape[-1],
                "num_classes": state["head.fc.weight"].shape[0]}  # fmt: skip
        return create(SWIN, args | more, size, "student")
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    args = {"embed_dim": width, "num_heads": heads[0], "mlp_ratio": hidden / width,
            "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            "patch_size": state["patch_embed.proj.weight"].shape[-1],
            "num_classes": state["head.weight"].shape[0]}  # fmt: skip
    return create(VIT, args | more, size, "student")


def drawn(keys: list[str], shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Parameters by the rule of the README, float64, under the names given."""
    out = {}
    for i, key in enumerate(sorted(keys)):
        z, shape = np.random.RandomState(seed + i).standard_normal(shapes[key]), shapes[key]
        if len(shape) == 1:
            z = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
        elif key.endswith("relative_position_bias_table"):
            z = 0.5 * z
        elif key.endswith("positional_embedding"):
            z = 0.3 * z
        else:
            fan = shape[0] if key.endswith(("proj", "projection")) else int(np.prod(shape[1:]))
            z = z / np.sqrt(fan)
        out[key] = torch.from_numpy(np.asarray(z))
    return out


def vit_shapes(keys: list[str], width: int, patch: int, out: int, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of CLIP's visual tower by the ends of upstream names."""
    by_end = {
        "class_embedding": (width,), "positional_embedding": (1 + (size // patch) ** 2, width),
        "conv1.weight": (width, 3, patch, patch), "in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,),
        "out_proj.weight": (width, width), "c_fc.weight": (4 * width, width), "c_fc.bias": (4 * width,),
        "c_proj.weight": (width, 4 * width), ".proj": (width, out), "vision_projection": (width, out),
        "image_projection": (width, out),
    }  # fmt: skip
    return {key: next((s for end, s in by_end.items() if key.endswith(end)), (width,)) for key in keys}


def vit_forward(case: Case) -> Checks:
    seed, width, patch, size = (int(np.ravel(case[k])[0]) for k in ("seed", "width", "patch", "resolution"))
    keys = [str(key) for key in case["sorted_param_keys"]]
    out, heads = (int(np.ravel(case[k])[0]) for k in ("embed_dim", "heads"))
    params = drawn(keys, vit_shapes(keys, width, patch, out, size), seed)
    state = to_timm(params)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        model = network(state, swin=False, heads=[heads], size=size).to(dtype).eval()
        load_strict(model, params)
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(case["images"]).to(dtype))
            pooled = model.forward_head(tokens, pre_logits=True)
            projected = model(torch.from_numpy(case["images"]).to(dtype))
        yield f"pre_projection {dtype}", pooled, case["pre_projection"], tolerance
        yield f"output {dtype}", projected, case["output"], tolerance
    yield "batch", [len(case["images"])], [int(np.ravel(case["batch"])[0])], 0.0


def swin_forward(case: Case) -> Checks:
    dim, depths, window = int(case["embed_dim"]), [int(d) for d in case["depths"]], int(case["window"])
    heads, size, out = [int(h) for h in case["heads"]], int(case["resolution"]), int(case["proj_dim"])
    args = {"embed_dim": dim, "depths": depths, "num_heads": heads, "window_size": window, "num_classes": out}
    model = create(SWIN, args, size, "student").double().eval()
    keys = [str(key) for key in case["sorted_param_keys"]]
    own = model.state_dict()
    names = {key: next(iter(to_timm({key: torch.zeros(1, 1), **MARK}, "dime_fm").keys() - MARKED)) for key in keys}
    shapes = {key: tuple(own[names[key]].shape) for key in keys}
    shapes["image_projection"] = shapes["image_projection"][::-1]
    load_strict(model, drawn(keys, shapes, int(case["seed"])))
    with torch.no_grad():
        images = tensor(case["images"])
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        yield "pooled", pooled, case["pooled"], 1e-9
        yield "output", model(images), case["output"], 1e-9


# A key that marks a state dict of one tensor as a Swin, and its name in timm.
MARK = {"image_encoder.layers.0.blocks.0.mark": torch.zeros(1)}
MARKED = {"layers.0.blocks.0.mark"}


def released_layout(case: Case) -> Checks:
    keys, width = [str(key) for key in case["param_keys_sorted"]], int(case["width"])
    out, patch, size = (int(case[k]) for k in ("embed_dim", "patch", "resolution"))
    params = drawn(keys, vit_shapes(keys, width, patch, out, size), int(case["seed"]))
    params = {key: value.float() for key, value in params.items()}
    for key in params:
        if key.endswith(("conv1.weight", "class_embedding", "positional_embedding")):
            params[key] = params[key] * float(case["shrink_conv_cls_pos"])
    saved = {key.replace("vision_projection", "image_projection").replace("visual.", "image_encoder."): value
             for key, value in params.items()}  # fmt: skip
    yield "saved_keys", sorted(saved), sorted(str(key) for key in case["saved_keys"]), 0.0
    for state in (saved, params):  # as the file has it, and as the loader renames it
        model = network(to_timm({"model": state}), swin=False, heads=[int(case["heads"])], size=size,
                        norm_eps=float(case["ln_eps"]))  # fmt: skip
        load_strict(model, {"model": state})
        with torch.no_grad():
            features = model.eval()(torch.from_numpy(case["images"]))
        yield "features", features, case["features"], 2e-4
        yield "features_normalised", nn.functional.normalize(features, dim=-1), case["features_normalised"], 2e-4


def param_groups(case: Case) -> Checks:
    from core.methods.dime_fm import groups

    names = [str(name) for name in case["all_names_in_order"]]
    shapes = [tuple(int(n) for n in re.findall(r"\d+", str(s))) for s in case["all_shapes"]]
    with torch.device("meta"):
        given = {name: torch.empty(shape) for name, shape in zip(names, shapes, strict=True)}
    swin = any("relative_position_bias_table" in name for name in names)
    state = to_timm(given)
    if swin:
        sizes = swin_sizes(state)
    else:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        sizes = {"heads": [1], "size": side * state["patch_embed.proj.weight"].shape[-1]}
    with torch.device("meta"):
        model = network(state, swin=swin, **sizes)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    timm_name = timm_names(names, swin)
    yield "every parameter", sorted(timm_name.values()), sorted(own), 0.0
    turned = {name for name in names if name.endswith(("visual.proj", "projection"))}
    for name, shape in zip(names, shapes, strict=True):
        want = shape[::-1] if name in turned else shape
        yield f"shape of {name}", list(own[timm_name[name]].squeeze().shape), [n for n in want if n != 1], 0.0
    decay, free = groups(model, 0.05)
    for key, group in (("decay", decay), ("no_decay", free)):
        yield key, [n for n in names if timm_name[n] in group["names"]], [str(n) for n in case[key]], 0.0


def swin_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """Heads, window and a size of images from the bias tables of timm weights: the last stage is one window."""
    end = "blocks.0.attn.relative_position_bias_table"
    tables = [tuple(v.shape) for _, v in sorted((k, v) for k, v in state.items() if k.endswith(end))]
    windows = [(math.isqrt(places) + 1) // 2 for places, _ in tables]
    size = state["patch_embed.proj.weight"].shape[-1] * windows[-1] * 2 ** (len(tables) - 1)
    return {"heads": [heads for _, heads in tables], "window": windows[0], "size": size}


def timm_names(names: list[str], swin: bool) -> dict[str, str]:
    out = {}
    for name in names:
        mark, marked = (MARK, MARKED) if swin else ({}, set())
        layout = "dime_fm" if swin else "clip"
        out[name] = next(iter(to_timm({name: torch.zeros(1, 1), **mark}, layout).keys() - marked))
    return out


def param_groups_full(case: Case) -> Checks:
    from core.methods.dime_fm import groups

    columns = [str(name) for name in case["columns"]]
    for key in (key for key in case if key != "columns"):
        with torch.device("meta"):
            decay, free = groups(create(FULL[key], {"num_classes": 768}, 224, "student"), 0.05)
        found = {}
        for kind, group in (("decay", decay), ("no_decay", free)):
            found[f"n_{kind}_tensors"] = len(group["params"])
            found[f"{kind}_scalars"] = sum(p.numel() for p in group["params"])
        yield key, [found[name] for name in columns], case[key], 0.0


def tokenizer(case: Case) -> Checks:
    ids = tokenize([str(text) for text in case["texts"]], case["ids"].shape[1])
    yield "ids", ids, case["ids"], 0.0
    yield "argmax_position", pool_position(ids), case["argmax_position"], 0.0


UNITS: dict[str, Unit] = {
    "loss": losses,
    "loss_flags": loss_flags,
    "loss_global_batch": loss_global_batch,
    "logits": logits,
    "lr_schedule": lr_schedule,
    "param_groups": param_groups,
    "param_groups_full": param_groups_full,
    "vit_forward": vit_forward,
    "swin_forward": swin_forward,
    "released_layout": released_layout,
    "tokenizer": tokenizer,
    "train_steps": elsewhere("dime_fm_steps", "train_steps"),
    **{name: elsewhere("dime_fm_data", name) for name in (
        "crop_boxes", "eval_transform", "transform_train", "lineidx", "lineidx_bad", "tsv", "tsv_route",
        "text_decode", "text_stream",
    )},
    **{name: elsewhere("dime_fm_evaluation", name) for name in (
        "metrics", "probe_search", "probe_split", "probe_train", "probe_trainable",
    )},
    "zeroshot": elsewhere("dime_fm_evaluation", "zero_shot"),
}  # fmt: skip
KNOWN = ("student_img", "sorted_param_keys", "lr_used_at_step", "all_names_in_order", "swin_t", "x1", "texts",
         "param_keys_sorted", "boxes", "center_stride8_0", "torch_seed_of_image", "tsv_0", "image_chunk_sizes",
         "dataroot", "multilabel", "visited_lr_wd_score", "multiclass_labels", "init_text_weights", "text_embeddings",
         "distilled_model")  # fmt: skip


def claims(case: Case) -> bool:
    items = case.get("items", [])
    streams = any(re.fullmatch(r"img\d+_txt\d+", key) for key in case)
    decoded = bool(items) and isinstance(items, list) and "payload" in items[0]
    return streams or decoded or any(key in case for key in KNOWN)
