"""Units of the DIME-FM cases: losses, schedule, parameter groups, networks and text; data and evaluation beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.data.features import IMAGE, TEXT
from core.inputs import schedule
from core.losses_pairs import Weights, cosine_scores, score_losses
from core.methods.base import Batch
from core.methods.dime_fm import DimeFm, DimeFmOptions, groups
from core.models.students import create
from core.models.text import pool_position, tokenize
from core.models.weights import load_strict, to_timm
from core.recipe import Train
from tests.golden.networks import tensor
from tests.golden.runner import Case, Check, Unit, elsewhere
from tests.golden.scale import relative

Checks = Iterator[Check]
VIT, SWIN = "vit_base_patch32_clip_quickgelu_224", "swin_tiny_patch4_window7_224"
FULL = {"vit_b32": VIT, "vit_b16": "vit_base_patch16_clip_quickgelu_224", "swin_t": SWIN,
        "swin_s": "swin_small_patch4_window7_224", "swin_b": "swin_base_patch4_window7_224"}  # fmt: skip


def losses(case: Case) -> Checks:
    """Through the method, in the precision of the arrays, and in every other that the product offers."""
    if "ref_vl_pvl_udist_total" in case:
        return _precisions(case)
    return _drawn(case) if "student_img" not in case else _one_loss(case)


def vectors(case: Case) -> list[Tensor]:
    """Student's and teacher's image vectors and the sentences', as recorded."""
    return [torch.from_numpy(np.array(case[name])) for name in ("student_img", "teacher_img", "teacher_text")]


def method_of(case: Case) -> DimeFm:
    """With the case's weights and temperatures; a term whose flag is off has weight 0."""
    options = dict(zip(("t_vl", "t_pvl", "t_udist"), case["temps"].tolist(), strict=True))
    vl, pvl, udist = (float(weight) for weight in case["weights"])
    flags = [bool(flag) for flag in case["flags_pvl_udist"]] if "flags_pvl_udist" in case else [True, True]
    return DimeFm(DimeFmOptions(vl=vl, pvl=pvl * flags[0], udist=udist * flags[1], **options), Train(), 1)


def loss_of(method: DimeFm, student: Tensor, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Total and terms by the names of the files, and the gradient of the student's vectors."""
    leaf = student.clone().requires_grad_()
    total, report = method.losses(leaf, {IMAGE: image, TEXT: text}, Batch({}))
    total.backward()
    terms = {name.removeprefix("loss/"): value for name, value in report.items()}
    assert leaf.grad is not None
    return {**terms, "total": total.detach(), "grad_student": leaf.grad}


def _one_loss(case: Case) -> Checks:
    found = loss_of(method_of(case), *vectors(case))
    for name in unweighed(case):  # the method computes no term without a weight, whatever its flag says
        found[name] = _term(case, name)
    tolerance = 2e-5 if case["student_img"].dtype == np.float32 else 1e-10
    yield from ((name, value, case[name], tolerance) for name, value in found.items() if name in case)


def unweighed(case: Case) -> list[str]:
    """Terms whose flag is on and whose weight is 0."""
    switches = zip(("pvl", "udist"), case["flags_pvl_udist"], case["weights"][1:], strict=True)
    return [name for name, on, weight in switches if on and not weight]


def _term(case: Case, name: str) -> Tensor:
    weights = Weights(*case["weights"].tolist(), *case["temps"].tolist())
    return score_losses(*vectors(case), weights, *(bool(flag) for flag in case["flags_pvl_udist"]))[1][name]


def _precisions(case: Case) -> Checks:
    """Close to the end of a training, where half precision shows."""
    columns, method, given = ("vl", "pvl", "udist", "total"), method_of(case), vectors(case)
    wide = loss_of(method, *(x.double() for x in given))
    want = case["ref_vl_pvl_udist_total"]
    yield "ref_vl_pvl_udist_total", [wide[name] for name in columns], want, 1e-10
    runs = [("float32", loss_of(method, *given)["total"])]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            runs.append((f"autocast {dtype}", loss_of(method, *given)["total"]))
    yield from (relative(f"total in {name}", total.double(), want[-1:].sum(), 1e-3) for name, total in runs)


def _drawn(case: Case) -> Checks:
    """A large batch, drawn by the rule of its description."""
    draw, shape = np.random.RandomState(int(case["seed"])), (int(case["B"]), int(case["d"]))
    mi = draw.standard_normal(shape[1])
    mt = 0.3 * mi + draw.standard_normal(shape[1])
    ti = mi + 0.25 * draw.standard_normal(shape)
    tt = mt + 0.25 * draw.standard_normal(shape)
    st = ti + 0.3 * draw.standard_normal(shape)
    ends = [st[3, 5], ti[-1, -1], tt[0, 0]]
    yield "check_inputs", [st.sum(), ti.sum(), tt.sum(), *ends], case["check_inputs"], 1e-10
    student, image, text = (torch.from_numpy(x) for x in (st, ti, tt))
    corner = case["teacher_logits_corner"]
    scores = cosine_scores(image, text)[: corner.shape[0], : corner.shape[1]]
    yield "teacher_logits_corner", scores, corner, 1e-8
    found = loss_of(method_of(case), student, image, text)
    grad = found.pop("grad_student")
    yield from ((name, value, case[name], 1e-8) for name, value in found.items() if name in case)
    yield "grad_rows", grad[::97, ::31], case["grad_rows"], 1e-8
    yield "grad_norm", grad.norm(), case["grad_norm"], 1e-8


def loss_flags(case: Case) -> Checks:
    columns = [str(name) for name in case["columns"]]
    student, image, text = vectors(case)
    for number, values in enumerate(case["table"]):
        row = dict(zip(columns, values.tolist(), strict=True))
        weights = Weights(row["w_vl"], row["w_pvl"], row["w_udist"], *case["temps"].tolist())
        leaf = student.clone().requires_grad_()
        total, terms = score_losses(leaf, image, text, weights, bool(row["use_pvl"]), bool(row["use_udist"]))
        total.backward()
        assert leaf.grad is not None
        found = {**terms, "total": total.detach(), "abs_grad_sum": leaf.grad.abs().sum()}
        got = [float(found[name].detach()) if name in found else row[name] for name in columns]
        yield f"table {number}", got, values, 1e-10


def logits(case: Case) -> Checks:
    scores = cosine_scores(tensor(case["x1"]), tensor(case["x2"]))
    yield "logits_per_x1", scores, case["logits_per_x1"], 1e-11
    yield "logits_per_x2", scores.T, case["logits_per_x2"], 1e-11


def lr_schedule(case: Case) -> Checks:
    """The method's rates; upstream's function of a step is the rate that the method uses one step later."""
    decay = float(case["weight_decay_by_group"].max())
    train = Train(epochs=int(case["epochs"]), warmup_epochs=float(case["warmup_epochs"]), batch=2, micro_batch=2,
                  lr=float(case["base_lr"]), lr_batch=0, min_lr=float(case["min_lr"]), weight_decay=decay)  # fmt: skip
    options = DimeFmOptions(warmup_lr=float(case["warmup_lr"]))
    method = DimeFm(options, *schedule(train, train.batch * int(case["n_iter"])))
    lr, steps = [method.schedules(step)["lr"] for step in range(2 * method.steps)], method.steps
    for name, start in (("lr_used_at_step", 0), ("lr_function", 1), ("lr_function_past_end", steps + 1)):
        yield name, lr[start : start + len(case[name])], case[name], 1e-15
    decays = [group["weight_decay"] for group in method.param_groups(nn.Linear(2, 2))]
    yield "weight_decay_by_group", decays, case["weight_decay_by_group"], 0.0


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


def images_of(case: Case, channels: int = 3) -> Tensor:
    """Recorded images, or those that the case's seed draws."""
    if "images" in case:
        return torch.from_numpy(np.array(case["images"]))
    seed = int(case["image_seed"]) if "image_seed" in case else int(case["seed"]) - 1
    size = int(np.ravel(case["resolution"])[0])
    shape = (int(np.ravel(case["batch"])[0]), channels, size, size)
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def start(case: Case) -> dict[str, Tensor]:
    """Parameters under upstream's names, float64: recorded below `init/`, or drawn for the sizes that a case states."""
    recorded = {name: tensor(array) for name, array in case.below("init/").items()}
    keys = [str(key) for key in case["sorted_param_keys"]]
    if recorded:
        assert sorted(recorded) == sorted(keys), "init/ holds other parameters than sorted_param_keys"
        return recorded
    shapes = swin_shapes(case, keys) if "depths" in case else sizes_of_vit(case, keys)
    return drawn(keys, shapes, int(case["seed"]))


def sizes_of_vit(case: Case, keys: list[str]) -> dict[str, tuple[int, ...]]:
    width, patch, out, size = (int(np.ravel(case[k])[0]) for k in ("width", "patch", "embed_dim", "resolution"))
    depth = len({key.split("resblocks.")[1].split(".")[0] for key in keys if "resblocks." in key})
    assert depth == int(case["layers"]), f"{case['layers']} layers are stated, {depth} are named"
    return vit_shapes(keys, width, patch, out, size)


def swin_student(case: Case) -> nn.Module:
    dims = {"embed_dim": int(case["embed_dim"]), "window_size": int(case["window"])}
    args = {**dims, "depths": [int(d) for d in case["depths"]], "num_heads": [int(h) for h in case["heads"]],
            "num_classes": int(case["proj_dim"]), "drop_path_rate": 0.0}  # fmt: skip
    return create(SWIN, args | patch_of(case), int(case["resolution"]), "student")


def patch_of(case: Case) -> dict[str, int]:
    return {"patch_size": int(case["patch"])} if "patch" in case else {}


def swin_shapes(case: Case, keys: list[str]) -> dict[str, tuple[int, ...]]:
    own, names = swin_student(case).state_dict(), timm_names(keys, swin=True)
    shapes = {key: tuple(own[names[key]].shape) for key in keys}
    turned = {key for key in keys if key.endswith("projection")}
    return {key: shape[::-1] if key in turned else shape for key, shape in shapes.items()}


def vit_forward(case: Case) -> Checks:
    params, images = start(case), images_of(case)
    if "image_check" in case:
        flat = images.double().flatten()
        yield "image_check", [flat.sum(), flat[0], flat[-1]], case["image_check"], 1e-9
    state, heads = to_timm(params), [int(np.ravel(case["heads"])[0])]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        model = network(state, swin=False, heads=heads, size=images.shape[-1]).to(dtype).eval()
        load_strict(model, params)
        with torch.no_grad():
            tokens = model.forward_features(images.to(dtype))
            pooled = model.forward_head(tokens, pre_logits=True)
            projected = model(images.to(dtype))
        yield f"pre_projection {dtype}", pooled, case["pre_projection"], tolerance
        yield f"output {dtype}", projected, case["output"], tolerance
    yield "batch", [len(images)], [int(np.ravel(case["batch"])[0])], 0.0
    yield "resolution", images.shape[-1], int(np.ravel(case["resolution"])[0]), 0.0


def swin_forward(case: Case) -> Checks:
    model = swin_student(case).double().eval()
    load_strict(model, start(case))
    with torch.no_grad():
        images = images_of(case).double()
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        yield "pooled", pooled, case["pooled"], 1e-9
        yield "output", model(images), case["output"], 1e-9


# A key that marks a state dict of one tensor as a Swin, and its name in timm.
MARK = {"image_encoder.layers.0.blocks.0.mark": torch.zeros(1)}
MARKED = {"layers.0.blocks.0.mark"}


def released_layout(case: Case) -> Checks:
    keys, size = [str(key) for key in case["param_keys_sorted"]], int(case["resolution"])
    params = drawn(keys, sizes_of_vit(case, keys), int(case["seed"]))
    params = {key: value.float() for key, value in params.items()}
    for key in params:
        if key.endswith(("conv1.weight", "class_embedding", "positional_embedding")):
            params[key] = params[key] * float(case["shrink_conv_cls_pos"])
    saved = {key.replace("vision_projection", "image_projection").replace("visual.", "image_encoder."): value
             for key, value in params.items()}  # fmt: skip
    yield "saved_keys", sorted(saved), sorted(str(key) for key in case["saved_keys"]), 0.0
    images = images_of(case)
    for state in (saved, params):  # as the file has it, and as the loader renames it
        model = network(to_timm({"model": state}), swin=False, heads=[int(case["heads"])], size=size,
                        norm_eps=float(case["ln_eps"]))  # fmt: skip
        load_strict(model, {"model": state})
        with torch.no_grad():
            features = model.eval()(images)
        yield "features", features, case["features"], 2e-4
        yield "features_normalised", nn.functional.normalize(features, dim=-1), case["features_normalised"], 2e-4


def param_groups(case: Case) -> Checks:
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
    yield "all_names_in_order, in the product", sorted(timm_name.values()), sorted(own), 0.0
    turned = {name for name in names if name.endswith(("visual.proj", "projection"))}
    for name, shape in zip(names, shapes, strict=True):
        want = shape[::-1] if name in turned else shape
        yield f"all_shapes {name}", list(own[timm_name[name]].squeeze().shape), [n for n in want if n != 1], 0.0
    decay, free = groups(model, 0.05)
    for key, group in (("decay", decay), ("no_decay", free)):
        yield key, [n for n in names if timm_name[n] in group["names"]], case[key], 0.0


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
    "loss_global_batch": elsewhere("dime_fm_steps", "loss_global_batch"),
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
