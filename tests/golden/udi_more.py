"""Further units of the UDI cases: networks, parameter groups, pixels, evaluation."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.comm import Comm
from core.data.colour import Colour, apply_colour, normalize
from core.data.views import random_resized_crop
from core.evaluate.attention_masks import attention_masks
from core.evaluate.davis import neighbourhood, propagate, stretch
from core.evaluate.knn import knn as weighted_knn
from core.evaluate.last_layers import class_features, last_attention, last_layers
from core.evaluate.linear import cosine_lr, train_linear
from core.methods.udi import Udi, UdiModel, UdiOptions
from core.models.clip import set_norm_eps
from core.models.drop_path import SampleDropPath
from core.models.init import rescale_branches
from core.models.srs import SampledBackbone
from core.models.udi_heads import ProjectionHead
from core.models.vit import drop_rates, embed, residual_scale, resize_pos_embed
from core.optim import clip_per_parameter
from core.optim_lars import Lars
from core.optim_layers import layer_groups
from core.plain import PlainEngine
from core.recipe import Train
from tests.golden.networks import tensor
from tests.golden.runner import Case, Check
from tests.golden.units.udi import projection_head

Checks = Iterator[Check]


# ---- networks


def vit(
    state: Mapping[str, Tensor], heads: int, num_classes: int = 0, global_pool: str = "token"
) -> VisionTransformer:
    """timm's ViT of the shapes of a released state dict, its first class token and registers as one parameter."""
    hidden, dim = state["blocks.0.mlp.fc1.weight"].shape
    prefix, patch = state["cls_token"].shape[1], state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - prefix)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return VisionTransformer(
        side * patch, patch, num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=heads,
        mlp_ratio=hidden / dim, reg_tokens=prefix - 1, qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        global_pool=global_pool, fc_norm="fc_norm.weight" in state, final_norm="norm.weight" in state,
    )  # fmt: skip


def timm_name(name: str) -> str:
    """Layer scales are named otherwise by the release."""
    return re.sub(r"gamma_([12])$", r"ls\1.gamma", name)


def plain_vit(case: Case) -> VisionTransformer:
    state = {timm_name(name): tensor(array) for name, array in case.below("param/").items()}
    pool = "avg" if "mean_pool" in case and bool(case["mean_pool"]) else "token"
    model = vit(state, int(case["num_heads"]), len(state.get("head.bias", ())), pool)
    model.double().load_state_dict(state, strict=True)
    return model.eval()


def vit_wrapper(case: Case) -> Checks:
    state = {name: tensor(array) for name, array in case.below("param/").items()}
    inner = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    model = SampledBackbone(vit(inner, int(case["num_heads"])), int(case["num_heads"])).double().eval()
    model.load_state_dict(state, strict=True)
    set_norm_eps(model, float(case["eps"]))
    yield from _sizes(case, model.backbone, num_cls="num_prefix_tokens", patch_size="patch_embed.patch_size.0")
    images = {name: tensor(case[f"img_{name}"]) for name in ("global", "local", "rect")}
    maps = tensor(case["map"])
    cls, patches = model(images["global"], maps.transpose(0, 1).flatten(1, 2))
    yield "cls_global", cls, case["cls_global"], 1e-8
    assert patches is not None
    yield "patch_srs", patches.unflatten(1, (maps.shape[0], maps.shape[2])).transpose(0, 1), case["patch_srs"], 1e-8
    for name in ("local", "rect"):
        yield f"cls_{name}", model(images[name], None)[0], case[f"cls_{name}"], 1e-8
    yield "forward", cls, case["forward"], 1e-8
    for name in ("global", "local"):
        yield f"tokens_{name}", embed(model.backbone, images[name]), case[f"tokens_{name}"], 1e-8
    layers = sorted(key for key in case if key.startswith("inter_last"))
    for name, layer in zip(layers, last_layers(model.backbone, images["global"], len(layers)), strict=True):
        yield name, layer, case[name], 1e-8
    yield "last_attn", last_attention(model.backbone, images["global"]), case["last_attn"], 1e-8


def _sizes(case: Case, model: nn.Module, **of: str) -> Checks:
    """Sizes that a case tells beside its arrays, against those of a network made of the arrays."""
    for name, path in of.items():
        found: Any = model
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        yield name, found, case[name], 0.0


def pos_interp(case: Case) -> Checks:
    table, prefix, patch = tensor(case["pos_embed"]), int(case["num_cls"]), int(case["patch"])
    side = math.isqrt(table.shape[1] - prefix)
    for k in range(int(case["n"])):
        height, width = case[f"c{k}_hw"]
        want = case[f"c{k}_pos"]
        got = resize_pos_embed(table, (side, side), (int(height) // patch, int(width) // patch), prefix)
        yield f"c{k}_pos", got.reshape(want.shape), want, 1e-8


def drop_path(case: Case) -> Checks:
    x, p = tensor(case["x"]), float(case["p"])
    path = SampleDropPath(p)
    # A draw u of the release keeps a sample where u >= p; the product's own draws keep it where u < 1 - p.
    got = residual_scale(x, path.factors(1.0 - tensor(case["draw"]).flatten()))
    yield "out", got, case["out"], 1e-7
    rates = case["linspace_rates"]
    yield "linspace_rates", drop_rates(float(np.float32(rates[-1])), len(rates)), rates, 1e-7


def param_groups(case: Case) -> Checks:
    names = [str(name) for name in case["names"]]
    shapes = {n: ast.literal_eval(str(s)) for n, s in zip(names, case["shapes"], strict=True)}
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    train_gain = not bool(case["norm_last_layer"])
    module = released_module(meta, heads=1, srs_heads=1, train_gain=train_gain)
    own = dict(module.named_parameters())
    yield "names", [*own], names, 0.0
    yield "shapes", [str(tuple(p.shape)) for p in own.values()], case["shapes"], 0.0
    method = udi(UdiOptions(norm_last_layer=not train_gain))
    groups = method.param_groups(module)
    group_of = {name: int(group["weight_decay"] == 0) for group in groups for name in group["names"]}
    yield "group", [group_of.get(name, -1) for name in names], case["group"], 0.0
    levels = {key.split(".")[1] for key in map(str, case["state_keys"]) if key.startswith("head.")}
    keys = [k for k in module.state_dict() if not k.startswith("head.")]
    shared = [k.removeprefix("head.0") for k in module.state_dict() if k.startswith("head.")]
    keys += [f"head.{level}{k}" for level in sorted(levels) for k in shared]  # the release writes one head thrice
    yield "state_keys", keys, [str(key) for key in case["state_keys"]], 0.0


def udi(options: UdiOptions, steps: int = 10, **settings: Any) -> Udi:
    return Udi(options, Train(**{"weight_decay": 0.04, "precision": "fp32"} | settings), steps)


def released_module(state: Mapping[str, Tensor], heads: int, srs_heads: int, train_gain: bool) -> nn.Module:
    """The product's trainable module of the shapes of a released state dict (its names are the same)."""
    prefix = "backbone.backbone."
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    head = {name.removeprefix("head.0."): value for name, value in state.items() if name.startswith("head.0.")}
    return UdiModel(SampledBackbone(vit(inner, heads), srs_heads), projection_head(head, train_gain))


# ---- steps of the optimiser


def clip_per_param(case: Case) -> Checks:
    names = [key.removeprefix("before/") for key in case if key.startswith("before/")]
    grads = {name: tensor(case[f"before/{name}"]) for name in names}
    norms = clip_per_parameter([*grads.values()], float(case["clip"]))
    yield "norms", norms, case["norms"], 1e-6
    for name in names:
        yield f"after/{name}", grads[name], case[f"after/{name}"], 1e-6
    rest = {"freeze_epochs": int(case["freeze_last_layer"])} if "freeze_last_layer" in case else {}
    for epoch, cancelled in case.below("cancelled_epoch").items():
        yield f"cancelled_epoch{epoch}", _last_layer_waits(int(epoch), **rest), bool(cancelled), 0.0


def _last_layer_waits(epoch: int, **rest: int) -> bool:
    """Whether an optimiser step of this epoch leaves the last layer alone. rest: freeze_epochs, else the default."""
    torch.manual_seed(0)
    method = udi(UdiOptions(bottleneck=4, out=8, hidden=6, **rest), steps=200, epochs=100)
    method.epoch_steps = 2
    small = VisionTransformer(16, 8, num_classes=0, embed_dim=8, depth=1, num_heads=2, reg_tokens=1)
    module = UdiModel(SampledBackbone(small, 2), ProjectionHead(8, 6, 4, 8, True))
    engine = PlainEngine(module, method.param_groups(module), method.settings, Comm(torch.device("cpu")), True)
    last = module.head[0].last_layer.weight_v
    for _ in range(epoch * 2 + 1):
        before = last.detach().clone()
        sum(p.square().sum() for p in module.parameters() if p.requires_grad).backward()
        engine.step(lambda scale: 1e-3 * scale)
    return bool(last.equal(before))


def lars(case: Case) -> Checks:
    numbers = sorted(int(key[1:].split("_")[0]) for key in case if key.endswith("_init"))
    parameters = [nn.Parameter(tensor(case[f"p{i}_init"])) for i in numbers]
    optimiser = Lars(parameters, float(case["lr"]), weight_decay=float(case["wd"]), momentum=float(case["momentum"]),
                     trust=float(case["eta"]))  # fmt: skip
    for step in range(int(case["steps"])):
        for i, parameter in zip(numbers, parameters, strict=True):
            parameter.grad = tensor(case[f"g{i}_s{step}"])
        optimiser.step()
        for i, parameter in zip(numbers, parameters, strict=True):
            yield f"p{i}_s{step}", parameter.detach().clone(), case[f"p{i}_s{step}"], 1e-6


# ---- pixels


def pixels(case: Case) -> Checks:
    image, size = torch.from_numpy(case["image"]).permute(2, 0, 1), int(case["size"])
    resized = random_resized_crop(image, case["box_ijhw"], bool(case["hflip"]), size)
    yield "resized", *_levels_apart(resized.permute(1, 2, 0), case["resized"]), 1.0

    def coloured(solarise: bool) -> Tensor:
        radius = float(case["blur_radius"])
        colour = Colour(
            np.array([False]), np.full((1, 4), -1), np.zeros((1, 4)), np.array([bool(case["gray"])]),
            np.array([radius if radius > 0 else np.nan]), np.array([solarise]), box_passes=3,
        )  # fmt: skip
        return apply_colour(resized.unsqueeze(0), colour)[0]

    levels = torch.arange(256, dtype=torch.uint8).view(1, -1).expand(3, 1, -1)
    scale = normalize(levels)[:, 0]  # (3, 256) normalised value of every grey level, by channel
    blurred = (coloured(False).unsqueeze(-1) - scale.view(3, 1, 1, 256)).abs().argmin(-1).permute(1, 2, 0)
    yield "blurred", *_levels_apart(blurred, case["blurred"]), 1.0
    yield "out", coloured(bool(case["solarize"])), case["out"], 2e-2


def _levels_apart(got: Tensor, want: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances in grey levels and what they should be: one level counts the same in dark and bright pixels."""
    apart = np.abs(got.numpy().astype(np.int32) - want.astype(np.int32))
    return apart, np.zeros_like(apart)


# ---- evaluation


def knn(case: Case) -> Checks:
    arrays = [tensor(case[name]) for name in ("train", "train_y", "test", "test_y")]
    ks = [int(k) for k in case["ks"]]
    found = weighted_knn(*arrays, ks, float(case["T"]), num_classes=int(case["num_classes"]))
    yield "top1", [found[k][0] for k in ks], case["top1"], 1e-9
    exact = [i for i, k in enumerate(ks) if k >= 20]  # below, classes without votes tie
    yield "top5", [found[ks[i]][1] for i in exact], case["top5"][exact], 1e-9


def linear_probe(case: Case) -> Checks:
    model, last = plain_vit(case), int(case["n_last_blocks"])
    yield from _sizes(case, model, num_cls="num_prefix_tokens", patch="patch_embed.patch_size.0")
    images, labels = tensor(case["x"]), tensor(case["y"])
    with torch.no_grad():
        features = [class_features(model, x, last, bool(case["avgpool"])) for x in images]
    yield "feat0", features[0], case["feat0"], 1e-6
    epochs, batch = int(case["epochs"]), labels.shape[1]
    fitted = train_linear(
        torch.cat(features), labels.flatten(), [float(case["lr"])], [0.0], weight_CD=tensor(case["head_w0"]),
        bias_C=tensor(case["head_b0"]), orders=torch.arange(labels.numel()).repeat(epochs, 1), batch=batch,
        schedule=cosine_lr,
    )  # fmt: skip
    yield "head_w1", fitted.weight[0], case["head_w1"], 1e-6
    yield "head_b1", fitted.bias[0], case["head_b1"], 1e-6
    yield "lr_per_epoch", fitted.lr_used[0], case["lr_per_epoch"], 1e-6
    yield "epoch_loss", fitted.losses[0], case["epoch_loss"], 1e-6
    hits = fitted.logits(features[0])[0].argmax(-1) == labels[0]  # the first batch validates
    yield "val_acc1", 100.0 * hits.double().mean(), case["val_acc1"], 1e-6


def layer_decay_ft(case: Case) -> Checks:
    model, names = plain_vit(case), [timm_name(str(name)) for name in case["names"]]
    yield from _sizes(case, model, patch="patch_embed.patch_size.0")
    yield "depth", len(model.blocks), case["depth"], 0.0
    yield "layer scale", "blocks.0.ls1.gamma" in names, float(case["init_values"]) > 0, 0.0
    groups = layer_groups(model.named_parameters(), float(case["weight_decay"]), float(case["layer_decay"]))
    found = {name: group for group in groups for name in group["names"]}
    yield "names", sorted(found), sorted(names), 0.0
    yield "lr_scale", [found[name]["lr_scale"] for name in names], case["lr_scale"], 1e-12
    yield "wd", [found[name]["weight_decay"] for name in names], case["wd"], 0.0
    yield "n_groups", len(groups), case["n_groups"], 0.0
    x = tensor(case["x"])
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    yield "features", features, case["features"], 1e-6
    yield "logits", model(x), case["logits"], 1e-6
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        rescale_branches([*model.blocks])
    ratio = [float((p.detach() / before[n])[before[n] != 0].mean()) if before[n].any() else 1.0
             for n, p in ((name, model.get_parameter(name)) for name in names)]  # fmt: skip
    yield "init_ratio", ratio, case["init_ratio"], 1e-6


def attention_mask(case: Case) -> Checks:
    attention = tensor(case["attn"])[0, :, 0]
    mask, heat = attention_masks(attention, int(case["side"]), int(case["patch"]), float(case["threshold"]))
    yield "mask", mask.int(), case["mask"].astype(np.int32), 0.0
    yield "heat", heat, case["heat"], 1e-6


def davis_propagation(case: Case) -> Checks:
    labels, radius = tensor(case["seg_context"]), int(case["neighborhood"])
    out = propagate(tensor(case["feat_target"]), tensor(case["feat_context"]).transpose(1, 2), labels,
                    topk=int(case["topk"]), radius=radius, temperature=float(case["temperature"]))  # fmt: skip
    yield "seg_out", out.unsqueeze(0), case["seg_out"], 1e-6
    near = neighbourhood(*labels.shape[-2:], radius) if radius else torch.ones(case["neighborhood_mask"].shape)
    yield "neighborhood_mask", near.int(), case["neighborhood_mask"].astype(np.int32), 0.0
    yield "norm_mask", stretch(out), case["norm_mask"], 1e-6
