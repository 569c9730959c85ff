"""Evaluation units of the DIME-FM cases: zero-shot, metrics and the linear probe of the ELEVATER toolkit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from core.data.sentences import templates
from core.evaluate import elevater, zeroshot
from core.evaluate.metrics import accuracy, eleven_points, mean_per_class, metric, roc_auc
from core.models.students import create
from tests.golden.formula import evaluate
from tests.golden.networks import tensor
from tests.golden.runner import Case, Check

Checks = Iterator[Check]


def metrics(case: Case) -> Checks:
    labels, scores, tolerance = case["labels"], case["scores"], 1e-12
    if not np.isnan(case["acc"]):
        yield "acc", accuracy(labels, scores), case["acc"], tolerance
    yield "mean_per_class", mean_per_class(labels, scores), case["mean_per_class"], tolerance
    yield "map11", eleven_points(case["multilabel"], scores), case["map11"], tolerance
    yield "roc_auc", roc_auc(case["binary"], case["binary_scores"]), case["roc_auc"], tolerance


def zero_shot(case: Case) -> Checks:
    classifier = zeroshot.classifier(torch.from_numpy(case["text_embeddings"]))
    yield "classifier", classifier, case["classifier"], 2e-4
    found = zeroshot.probabilities(torch.from_numpy(case["image_features"]), classifier)
    yield "probabilities", found, case["probabilities"], 2e-4
    labels = case["labels"].squeeze(-1) if case["labels"].shape[-1] == 1 else case["labels"]
    yield "score", metric(str(case["metric"]))(labels, found.numpy()), case["score"], 2e-4
    firsts = [str(prompt) for prompt in case["first_prompts"]]
    own, names = _template(firsts)
    more = [template for template in templates() if template != own]
    made = [zeroshot.prompts([name, "another name"], [own, *more][: case["text_embeddings"].shape[1]])
            for name in names]  # fmt: skip
    yield "first_prompts", [prompts[0] for prompts in made], case["first_prompts"], 0.0
    yield "n_prompts", [len(prompts) for prompts in made], case["n_prompts"], 0.0


def _template(prompts: list[str]) -> tuple[str, list[str]]:
    """The product's own template that all prompts are made with, and the class names in them: neither is recorded."""
    for template in templates():
        head, tail = template.split("{}")
        if all(prompt.startswith(head) and prompt.endswith(tail) for prompt in prompts):
            return template, [prompt[len(head) : len(prompt) - len(tail)] for prompt in prompts]
    raise ValueError(f"no template of the product makes {prompts}")


def probe_split(case: Case) -> Checks:
    for kind in ("multiclass", "multilabel"):
        train, val = elevater.split_trainval(case[f"{kind}_labels"], float(case["val_fraction"]))
        yield f"{kind}_train_idx", train, case[f"{kind}_train_idx"], 0.0
        yield f"{kind}_val_idx", val, case[f"{kind}_val_idx"], 0.0


def probe_train(case: Case) -> Checks:
    names = ("train_x", "train_y", "val_x", "val_y")
    fitted = elevater.train_probe(
        *(tensor(case[name]) for name in names), weight_CD=tensor(case["init_text_weights"]).T.contiguous(),
        lr=float(case["lr"]), weight_decay=float(case["weight_decay"]), momentum=float(case["momentum"]),
        batch=int(case["batch_size"]), metric_name=str(case["metric"]),
        orders=tensor(case["sample_order"])[: int(case["epochs"])],
    )  # fmt: skip
    yield "val_score_per_epoch", fitted.scores, case["val_score_per_epoch"], 1e-9
    yield "best", fitted.best, case["best"], 1e-9
    yield "final_weight", fitted.weight, case["final_weight"], 1e-9
    yield "final_bias", fitted.bias, case["final_bias"], 1e-9
    yield "bn_running_mean", fitted.standardiser.mean, case["bn_running_mean"], 1e-9
    yield "bn_running_var", fitted.standardiser.var, case["bn_running_var"], 1e-9
    yield "best_probs", fitted.best_probabilities, case["best_probs"], 1e-9


def probe_search(case: Case) -> Checks:
    """Every trial in order, of the case's own learning rates where these are not the toolkit's."""

    def score(lr: float, decay: float) -> float:
        return evaluate(formula, {"lr": lr, "wd": decay})

    visited, formula = case["visited_lr_wd_score"], str(case["score_formula"])
    rates = [*dict.fromkeys(visited[:, 0].tolist())]
    own = elevater.LEARNING_RATES
    usual = len(rates) == len(own) and np.allclose(rates, own, rtol=1e-9, atol=0)
    edges = float(case["wd_log_range"][0]), float(case["wd_log_range"][1])
    found = elevater.search(score, own if usual else rates, edges, bool(case["use_left_only"]))
    yield "visited", np.log(np.array(found.trials)[:, :2]), np.log(visited[:, :2]), 1e-9
    yield "scores", [trial[2] for trial in found.trials], visited[:, 2], 1e-9
    yield "best_lr_wd", np.log([found.lr, found.weight_decay]), np.log(case["best_lr_wd"]), 1e-9


def probe_trainable(case: Case) -> Checks:
    """Names as the released students have them: of CLIP's tower, its projection within or beside it, and the head."""
    tiny = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 8}
    own = [name for name, _ in create("vit_base_patch32_clip_quickgelu_224", tiny, 16, "student").named_parameters()]
    tower = [f"backbone.visual.{name}" for name in own if not name.startswith("head.")]
    layers = ["layers.0.weight", "layers.0.bias"]
    beside = [*tower, "backbone.vision_projection", *layers]
    yield "distilled_model", elevater.trainable(beside), case["distilled_model"], 0.0
    yield "openai_clip", elevater.trainable([*tower, "backbone.visual.proj", *layers]), case["openai_clip"], 0.0
    honest = elevater.trainable(beside, frozen=("visual", "vision_projection"))
    yield "head alone", honest, case["openai_clip"], 0.0
