"""Feature-Distillation's rules: parameter groups, initial weights, key take-over, learning rates, recipes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config import load
from core.methods.fd import Fd, FdModel, FdOptions
from core.methods.finetune import SHARED, Classifier, Finetune, FinetuneOptions, own_tables
from core.models.init import init_student
from core.models.layouts.windowed import BUFFERS
from core.models.students import create
from core.models.weights import to_timm
from core.optim_layers import layer_groups
from core.recipe import Recipe, Train
from core.registry import create as create_method
from tests.golden.networks_fd import in_timm, meta, student
from tests.golden.runner import Case, Check

Checks = Iterator[Check]


def _layout(hp: dict[str, Any]) -> str:
    return "swin" if "depths" in hp else "beit"


def _renamed(name: str, hp: dict[str, Any]) -> str:
    """The product's name of an upstream parameter of the distillation or the fine-tuning network."""
    if name.startswith("decoder."):
        return name
    prefix = "encoder." if name.startswith("encoder.") else ""
    bare = name.removeprefix(prefix)
    return f"{prefix}{bare if bare.startswith('head.') else in_timm(bare, _layout(hp))}"


def _settings(hp: dict[str, Any], weight_decay: float = 0.05) -> Train:
    per_epoch = hp.get("iters_per_epoch", 1)
    return Train(batch=1, micro_batch=1, lr=hp.get("base_lr", 1.0), lr_batch=0, min_lr=hp.get("min_lr", 0.0),
                 warmup_steps=hp.get("warmup_epochs", 0) * per_epoch, weight_decay=weight_decay)  # fmt: skip


def groups_pretrain(case: Case) -> Checks:
    hp, names = meta(case), [str(name) for name in case["names"]]
    with torch.device("meta"):
        network = student(hp)
        module = FdModel(network, network.num_features, [4], (0, 0))
    decay = float(case["weight_decay"].max())
    groups = Fd(FdOptions(), _settings(hp, decay), 1).param_groups(module)
    of = {name: group["weight_decay"] for group in groups for name in group["names"]}
    mine = [_renamed(name, hp) for name in names]
    yield "names", sorted(of), sorted(mine), 0.0
    yield "weight_decay", [of[name] for name in mine], case["weight_decay"], 0.0
    yield "all_trainable", sorted(_renamed(str(name), hp) for name in case["all_trainable"]), sorted(of), 0.0


def groups_finetune(case: Case) -> Checks:
    hp, names = meta(case), [str(name) for name in case["names"]]
    with torch.device("meta"):
        network = student(hp, shared=False)
        module = Classifier(network, network.num_features, hp["num_classes"])
    options = FinetuneOptions(num_classes=hp["num_classes"], layer_decay=hp["layer_decay"])
    method = Finetune(options, _settings(hp, hp["weight_decay"]), 1)
    groups = {name.removeprefix("encoder."): group for group in method.param_groups(module) for name in group["names"]}
    mine = [_renamed(name, hp) for name in names]
    yield "names", sorted(groups), sorted(mine), 0.0
    found = [groups[name] for name in mine]
    titles = [f"layer_{group['layer']}_{'decay' if group['weight_decay'] else 'no_decay'}" for group in found]
    yield "group", titles, case["group"], 0.0
    yield "lr_scale", [group["lr_scale"] for group in found], case["lr_scale"], 1e-12
    yield "weight_decay", [group["weight_decay"] for group in found], case["weight_decay"], 1e-12
    yield "lr", [method.lr(0, group["lr_scale"]) for group in found], case["lr"], 1e-12


LARGE = 2000  # elements from which a deviation tells the distribution
CONSTANT = 1e-12  # deviation below which a tensor has one value, but for rounding
DRAWN = 4  # networks whose deviations are averaged, which leaves the noise of the recorded one alone


def init_stats(case: Case) -> Checks:
    """Large tensors by their deviation, relative; constant ones exactly; their extremes where they are cut off."""
    hp, names = meta(case), [str(name) for name in case["names"]]
    drawn = [dict(_initialised(hp, names, case["numel"], seed).named_parameters()) for seed in range(DRAWN)]
    own = drawn[0]
    mine = [own.get(name) if (name := _named(n, hp, own)) else None for n in names]
    yield "names", sorted(own), sorted(_named(name, hp, own) for name in names), 0.0
    yield "numel", [p.numel() for p in mine], case["numel"], 0.0
    for i, (name, parameter) in enumerate(zip(names, mine, strict=True)):
        p, std = parameter.detach().double(), float(case["std"][i])
        if std < CONSTANT:
            for key, value in (("mean", p.mean()), ("min", p.min()), ("max", p.max())):
                yield f"{key} of {name}", value, case[key][i], 1e-7
        else:
            yield f"mean of {name}", p.mean(), case["mean"][i], 6e-2
            if p.numel() >= LARGE:
                found = [each[_named(name, hp, own)].detach().double().std() for each in drawn]
                yield f"std of {name}", torch.stack(found).mean() / std, 1.0, 6e-2
                bound = max(abs(case["min"][i]), abs(case["max"][i]))
                yield f"extremes of {name}", bool(p.abs().max() <= 1.6 * bound), True, 0.0


def _named(name: str, hp: dict[str, Any], own: dict[str, nn.Parameter]) -> str:
    found = _renamed(name, hp)
    return found if found in own else f"encoder.{found}"


def _initialised(hp: dict[str, Any], names: list[str], numel: np.ndarray, seed: int) -> nn.Module:
    finetune, wrapped = "head.weight" in names, "decoder.0.bias" in names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = student(hp, shared=not finetune)
        if finetune:
            Finetune(FinetuneOptions(), _settings(hp), 1).initialise(network)
            return Classifier(network, network.num_features, hp["num_classes"])
        if wrapped:
            Fd(FdOptions(), _settings(hp), 1).initialise(network)
            return FdModel(network, network.num_features, [int(numel[names.index("decoder.0.bias")])], (0, 0))
        init_student(network)
        return network


def load_pretrained_keys(case: Case) -> Checks:
    hp = meta(case)
    network = student(hp)
    weights = network.state_dict()
    checkpoint = {str(key): weights.get(in_timm(str(key), "fd"), torch.empty(0)) for key in case["checkpoint_keys"]}
    state = to_timm(checkpoint, "fd")
    yield "checkpoint_keys", sorted(state), sorted(weights), 0.0
    model = Classifier(student(hp, shared=False), network.num_features, hp.get("num_classes", 3))
    own = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    loaded = own_tables(state, own)
    buffers = {name for name, _ in model.encoder.named_buffers() if re.search(BUFFERS, name)}
    recorded = {part: [str(key) for key in case[f"{part}_keys"]] for part in ("loaded", "missing", "unexpected")}
    yield "loaded_keys", sorted(loaded), sorted(_renamed(key, hp) for key in recorded["loaded"]), 0.0
    wanted = [_renamed(key, hp) or key for key in recorded["missing"]]
    yield "missing_keys", sorted({*own} - {*loaded} | buffers), sorted(wanted), 0.0
    unexpected = {*state} - {*loaded} - {SHARED}
    yield "unexpected_keys", sorted(unexpected), sorted(_renamed(key, hp) for key in recorded["unexpected"]), 0.0
    for key, value in loaded.items():
        source = state[key] if key in state else state[SHARED]
        yield f"value of {key}", value, source, 0.0


def lr_pretrain(case: Case) -> Checks:
    hp = meta(case)
    method = Fd(FdOptions(warmup_lr=hp["warmup_lr"]), _settings(hp), hp["epochs"] * hp["iters_per_epoch"])
    yield "lr", [method.schedules(step)["lr"] for step in range(method.steps)], case["lr"], 1e-12


def lr_finetune(case: Case) -> Checks:
    hp = meta(case)
    options = FinetuneOptions(warmup_lr=hp["warmup_lr"], layer_decay=hp["layer_decay"])
    method = Finetune(options, _settings(hp), hp["epochs"] * hp["iters_per_epoch"])
    depth = hp["depth"] if "depth" in hp else sum(hp["depths"])
    parts = ["cls_token", *(f"blocks.{i}.gamma_1" for i in range(depth)), "norm.bias"]
    groups = layer_groups([(name, nn.Parameter(torch.zeros(1))) for name in parts], 0.0, hp["layer_decay"])
    scales = [group["lr_scale"] for group in groups]
    yield "scales", scales, case["scales"], 1e-12
    yield "lr", [[method.lr(step, scale) for scale in scales] for step in range(method.steps)], case["lr"], 1e-12


RECIPES = {"clip_vit_base__img224__300ep": "fd-clip-b", "clip_vit_base__img224__100ep": "fd-clip-b-100ep",
           "clip_vit_large": "fd-clip-l", "dino_vit_base": "fd-dino-b", "deit_vit_base": "fd-deit-b",
           "esvit_swin_base": "fd-esvit-swin-b"}  # fmt: skip
TEACHERS = {"CLIP_400M": "vit_base_patch16_clip_quickgelu_224", "DINO": "vit_base_patch16_224",
            "CLIP_400M_Large": "vit_large_patch14_clip_quickgelu_224", "DEIT": "deit_base_patch16_224",
            "ESVIT": "swin_base_patch4_window7_224"}  # fmt: skip


def resolved_configs(case: Case) -> Checks:
    """Every key with a meaning for the result, against the product's recipe; logging, paths and unused keys aside."""
    for name, text in zip(case["names"], case["json"], strict=True):
        kind, _, rest = str(name).rpartition("/")[2].partition("__")
        recipe = load(next(ours for theirs, ours in RECIPES.items() if rest.startswith(theirs)))
        wanted, stage = json.loads(str(text)), "finetune" if "finetune" in kind else "distil"
        for key, value in _resolved(recipe, stage).items():
            want = wanted[key]
            yield f"{name} {key}", np.asarray(value), np.asarray(want), 1e-9
        for key, value in _scaled(recipe, stage).items():
            yield f"{name} scaled {key}", value, wanted["_scaled_at_16_gpus"][key], 1e-9


def _scaled(recipe: Recipe, stage: str) -> dict[str, float]:
    """The three rates at the recipe's batch, read off the method's schedule."""
    settings, own, warmup = recipe.stage(stage), recipe.at(stage), 10
    settings = dataclasses.replace(settings, warmup_steps=warmup)
    method = create_method(own, settings, 10**6)
    rates = [method.schedules(step)["lr"] for step in (0, warmup + 1, 10**9)]
    return dict(zip(("WARMUP_LR", "BASE_LR", "MIN_LR"), rates, strict=True))


def _resolved(recipe: Recipe, stage: str) -> dict[str, Any]:
    own, s = recipe.at(stage), recipe.stage(stage)
    options = create_method(own, s, 1).options
    keys: dict[str, Any] = {
        "MODEL.NAME": {"distil": "fd_pretrain", "finetune": "fd_finetune"}[stage],
        "_global_batch_at_16_gpus": s.batch, "DATA.BATCH_SIZE": s.micro_batch, "DATA.IMG_SIZE": s.img_size,
        "TRAIN.BASE_LR": s.lr, "TRAIN.MIN_LR": s.min_lr, "TRAIN.WARMUP_LR": options.warmup_lr,
        "TRAIN.EPOCHS": s.epochs, "TRAIN.WARMUP_EPOCHS": s.warmup_epochs, "TRAIN.WEIGHT_DECAY": s.weight_decay,
        "TRAIN.OPTIMIZER.BETAS": s.betas, "TRAIN.OPTIMIZER.EPS": s.eps, "TRAIN.CLIP_GRAD": s.clip,
        "MODEL.DROP_PATH_RATE": own.student.drop_path, "AUG.MAX_SCALE": options.scale[1],
    }  # fmt: skip
    keys |= _network(own, s.img_size, shared=stage == "distil")
    if stage == "distil":
        (teacher,) = own.teachers.values()
        source = next(name for name, timm in TEACHERS.items() if timm == teacher.name)
        keys |= {"AUG.MIN_SCALE": options.scale[0], "DEV.PRED_FEAT": source, "DEV.PRED_FEAT_AFTERNORM": teacher.norm}
    else:
        keys |= {"TRAIN.LAYER_DECAY": options.layer_decay, "MODEL.NUM_CLASSES": options.num_classes,
                 "MODEL.LABEL_SMOOTHING": options.smoothing, "AUG.MIXUP": options.mixup, "AUG.CUTMIX": options.cutmix,
                 "AUG.MIXUP_SWITCH_PROB": options.switch, "AUG.REPROB": options.erase,
                 "AUG.AUTO_AUGMENT": options.rand_augment}  # fmt: skip
    return keys


def _network(recipe: Recipe, img_size: int, shared: bool) -> dict[str, Any]:
    with torch.device("meta"):
        model: Any = create(recipe.student.name, recipe.student.args, img_size, "student")
    if not hasattr(model, "layers"):
        block = model.blocks[0]
        return {"MODEL.TYPE": "vit", "MODEL.VIT.DEPTH": len(model.blocks), "MODEL.VIT.EMBED_DIM": model.embed_dim,
                "MODEL.VIT.NUM_HEADS": block.attn.num_heads, "MODEL.VIT.PATCH_SIZE": model.patch_embed.patch_size[0],
                "MODEL.VIT.INIT_VALUES": block.init_values, "MODEL.VIT.QKV_BIAS": block.attn.q_bias is not None,
                "MODEL.VIT.MLP_RATIO": block.mlp.fc1.out_features / model.embed_dim,
                "MODEL.VIT.USE_APE": model.pos_embed is not None,
                "MODEL.VIT.USE_SHARED_RPB": model.rel_pos_bias is not None,
                "MODEL.VIT.USE_RPB": block.attn.relative_position_bias_table is not None}  # fmt: skip
    stages = [layer.blocks for layer in model.layers]
    return {"MODEL.TYPE": "swin_v2", "MODEL.SWIN.DEPTHS": [len(blocks) for blocks in stages],
            "MODEL.SWIN.NUM_HEADS": [blocks[0].attn.num_heads for blocks in stages],
            "MODEL.SWIN.EMBED_DIM": stages[0][0].dim, "MODEL.SWIN.WINDOW_SIZE": stages[0][0].window_size[0],
            "MODEL.SWIN.PATCH_SIZE": model.patch_embed.patch_size[0], "MODEL.SWIN.USE_SHARED_RPB": False,
            "MODEL.SWIN.MLP_RATIO": stages[0][0].mlp_ratio}  # fmt: skip
