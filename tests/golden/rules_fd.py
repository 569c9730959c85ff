"""Feature-Distillation's rules: parameter groups, initial weights, key take-over, learning rates, recipes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config import load
from core.inputs import schedule
from core.methods.fd import Fd, FdModel, FdOptions
from core.methods.finetune import SHARED, Classifier, Finetune, FinetuneOptions, own_tables
from core.models.layouts.windowed import BUFFERS
from core.models.students import create
from core.models.weights import to_timm
from core.optim_layers import layer_groups
from core.recipe import Recipe, Train
from core.registry import create as create_method
from tests.golden.networks_fd import distilled, in_module, in_timm, meta, student
from tests.golden.runner import Case, Check

Checks = Iterator[Check]


def _own_names(names: Iterable[Any], hp: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The product's names of upstream parameters, without those that it has not, and which these are."""
    mine = [in_module(str(name), hp) for name in names]
    known = [i for i, name in enumerate(mine) if name]
    return [mine[i] for i in known], known


def _scheduled(hp: dict[str, Any], weight_decay: float = 0.05) -> tuple[Train, int]:
    """Settings and steps of a stage of one image a step."""
    settings = Train(batch=1, micro_batch=1, lr=hp.get("base_lr", 1.0), lr_batch=0, min_lr=hp.get("min_lr", 0.0),
                     epochs=hp.get("epochs", 1), warmup_epochs=hp.get("warmup_epochs", 0.0),
                     weight_decay=weight_decay)  # fmt: skip
    return schedule(settings, hp.get("iters_per_epoch", 1))


def groups_pretrain(case: Case) -> Checks:
    hp, names = meta(case), case["names"]
    with torch.device("meta"):
        network = student(hp)
        module = FdModel(network, network.num_features, [4], (0, 0))
    decay = float(case["weight_decay"].max())
    groups = Fd(FdOptions(), *_scheduled(hp, decay)).param_groups(module)
    of = {name: group["weight_decay"] for group in groups for name in group["names"]}
    mine, known = _own_names(names, hp)
    yield "names", sorted(of), sorted(mine), 0.0
    yield "weight_decay", [of[name] for name in mine], case["weight_decay"][known], 0.0
    yield "all_trainable", sorted(of), sorted(_own_names(case["all_trainable"], hp)[0]), 0.0


def groups_finetune(case: Case) -> Checks:
    hp = meta(case)
    with torch.device("meta"):
        network = student(hp)
        module = Classifier(network, network.num_features, hp["num_classes"])
    options = FinetuneOptions(num_classes=hp["num_classes"], layer_decay=hp["layer_decay"])
    method = Finetune(options, *_scheduled(hp, hp["weight_decay"]))
    groups = {name: group for group in method.param_groups(module) for name in group["names"]}
    mine, known = _own_names(case["names"], hp)
    yield "names", sorted(groups), sorted(mine), 0.0
    found = [groups[name] for name in mine]
    titles = [f"layer_{group['layer']}_{'decay' if group['weight_decay'] else 'no_decay'}" for group in found]
    yield "group", titles, case["group"][known], 0.0
    yield "lr_scale", [group["lr_scale"] for group in found], case["lr_scale"][known], 1e-12
    yield "weight_decay", [group["weight_decay"] for group in found], case["weight_decay"][known], 1e-12
    yield "lr", [method.lr(0, group["lr_scale"]) for group in found], case["lr"][known], 1e-12


LARGE = 2000  # elements from which a deviation tells the distribution
CONSTANT = 1e-12  # deviation below which a tensor has one value, but for rounding
DRAWN = 4  # networks whose deviations are averaged, which leaves the noise of the recorded one alone


def init_stats(case: Case) -> Checks:
    """Large tensors by their deviation, relative; constant ones exactly; their extremes where they are cut off."""
    hp, recorded = meta(case), [str(name) for name in case["names"]]
    drawn = [_initialised(hp, recorded, case["numel"], seed) for seed in range(DRAWN)]
    names, known = _own_names(recorded, hp)
    yield "names", sorted(drawn[0]), sorted(names), 0.0
    yield "numel", [drawn[0][name].numel() for name in names], case["numel"][known], 0.0
    for i, name in zip(known, names, strict=True):
        p, std = drawn[0][name].detach().double(), float(case["std"][i])
        if std < CONSTANT:
            for key, value in (("mean", p.mean()), ("min", p.min()), ("max", p.max())):
                yield f"{key} of {name}", value, case[key][i], 1e-7
        else:
            yield f"mean of {name}", p.mean(), case["mean"][i], 6e-2
            if p.numel() >= LARGE:
                found = [each[name].detach().double().std() for each in drawn]
                yield f"std of {name}", torch.stack(found).mean() / std, 1.0, 6e-2
                bound = 1.6 * max(abs(case["min"][i]), abs(case["max"][i]))
                for key, value in (("min", p.min()), ("max", p.max())):
                    yield f"{key} of {name} is no further out", bool(value.abs() <= bound), True, 0.0


def _initialised(hp: dict[str, Any], names: list[str], numel: np.ndarray, seed: int) -> dict[str, nn.Parameter]:
    """Parameters of the fine-tuning network, of the distillation's, or of its student alone, as the names say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = student(hp)
        if "head.weight" in names:
            Finetune(FinetuneOptions(), *_scheduled(hp)).initialise(network)
            module: nn.Module = Classifier(network, network.num_features, hp["num_classes"])
        else:
            Fd(FdOptions(), *_scheduled(hp)).initialise(network)
            wide = [int(numel[names.index(name)]) for name in names if name == "decoder.0.bias"]
            module = FdModel(network, network.num_features, wide, (0, 0))
    return dict(module.named_parameters())


def load_pretrained_keys(case: Case) -> Checks:
    hp = meta(case)
    network = student(distilled(hp))
    weights = network.state_dict()
    checkpoint = {str(key): weights.get(in_timm(str(key), "fd"), torch.empty(0)) for key in case["checkpoint_keys"]}
    state = to_timm(checkpoint, "fd")
    yield "checkpoint_keys", sorted(state), sorted(weights), 0.0
    model = Classifier(student(hp), network.num_features, hp.get("num_classes", 3))
    own = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    loaded = own_tables(state, own)
    buffers = {name for name, _ in model.encoder.named_buffers() if re.search(BUFFERS, name)}

    def recorded(part: str) -> list[str]:
        named = [(str(key), in_module(str(key), hp)) for key in case[f"{part}_keys"]]
        return sorted(name.removeprefix("encoder.") or key for key, name in named if not key.endswith("attn.k_bias"))

    yield "loaded_keys", sorted(loaded), recorded("loaded"), 0.0
    yield "missing_keys", sorted({*own} - {*loaded} | buffers), recorded("missing"), 0.0
    yield "unexpected_keys", sorted({*state} - {*loaded} - {SHARED}), recorded("unexpected"), 0.0
    for key, value in loaded.items():
        source = state[key] if key in state else state[SHARED]
        yield f"value of {key}", value, source, 0.0


def lr_pretrain(case: Case) -> Checks:
    hp = meta(case)
    method = Fd(FdOptions(warmup_lr=hp["warmup_lr"]), *_scheduled(hp))
    yield "lr", [method.schedules(step)["lr"] for step in range(method.steps)], case["lr"], 1e-12


def lr_finetune(case: Case) -> Checks:
    hp = meta(case)
    options = FinetuneOptions(warmup_lr=hp["warmup_lr"], layer_decay=hp["layer_decay"])
    method = Finetune(options, *_scheduled(hp))
    blocks = [f"layers.{s}.blocks.{i}" for s, depth in enumerate(hp.get("depths", ())) for i in range(depth)]
    blocks = blocks or [f"blocks.{i}" for i in range(hp["depth"] if "depth" in hp else hp["blocks"])]
    parts = ["patch_embed.proj.bias", *(f"{block}.norm1.bias" for block in blocks), "norm.bias"]
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
            yield f"json of {name} {key}", np.asarray(value), np.asarray(want), 1e-9
        for key, value in _scaled(recipe, stage).items():
            yield f"json of {name} scaled {key}", value, wanted["_scaled_at_16_gpus"][key], 1e-9


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
