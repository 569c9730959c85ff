"""Units of the Proteus cases about evaluation: probes, fine-grained transfer, segmentation and depth."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from core.data.pillow import NORMS, eval_pil
from core.evaluate import dense, depth, finegrained
from core.evaluate.dense_backbone import DenseBackbone, Maps, to_dense
from core.evaluate.dpt import DptHead
from core.evaluate.knn import knn as weighted_knn
from core.evaluate.knn import knn_votes
from core.evaluate.probe_grid import ProbeGrid
from core.evaluate.upernet import ScaleNeck, UperHead
from core.schedules import warmup_linear
from tests.golden.networks import norm_of, tensor
from tests.golden.runner import Case, Check, Unit
from tests.golden.scale import relative

Checks = Iterator[Check]


# -- frozen features ------------------------------------------------------------------------------------------------


def knn(case: Case) -> Checks:
    arrays = [tensor(case[key]) for key in ("train_features", "train_labels", "test_features", "test_labels")]
    ks, classes = [int(k) for k in case["ks"]], int(case["num_classes"])
    temperature = float(case["temperature"])
    votes = knn_votes(*arrays[:3], ks, temperature, num_classes=classes)
    found = weighted_knn(*arrays, ks, temperature, num_classes=classes)
    for k in ks:
        yield relative(f"probs_{k}", votes[k], case[f"probs_{k}"], 5e-6)
        yield relative(f"top1_{k}", found[k][0] / 100, case[f"top1_{k}"], 5e-6)


def linear_probe(case: Case) -> Checks:
    names = [str(name) for name in case["names"]]
    parts = [re.fullmatch(r"classifier_(\d+)_blocks_avgpool_(\w+)_lr_.*", name) for name in names]
    blocks = list(dict.fromkeys(int(part[1]) for part in parts if part))
    pooled = list(dict.fromkeys(part[2] == "True" for part in parts if part))
    classes, width = case[f"init/{names[0]}/weight"].shape[0], case["cls_0"].shape[-1]
    grid = ProbeGrid(width, classes, int(case["batch_size"]), int(case["max_iter"]), generator=torch.Generator(),
                     rates=[float(lr) for lr in case["lrs_base"]], blocks=blocks, pooled=pooled,
                     dtype=torch.float64)  # fmt: skip
    yield "names", grid.names(), names, 0.0
    yield "in_dims", [g.weight.shape[-1] for g in grid.groups for _ in g.lr], case["in_dims"], 0.0
    places = [(group, i) for group in grid.groups for i in range(len(group.lr))]
    for name, (group, i) in zip(names, places, strict=True):
        group.weight[i], group.bias[i] = tensor(case[f"init/{name}/weight"]), tensor(case[f"init/{name}/bias"])
    for step in range(int(case["steps"])):
        yield relative(f"lr_history {step}", grid.lr_now(), case["lr_history"][step], 1e-6)
        cls, patch = tensor(case[f"cls_{step}"]), tensor(case[f"patch_{step}"])
        losses = grid.step(list(cls), patch[-1], tensor(case["labels"][step]))
        yield relative(f"losses {step}", losses, case["losses"][step], 1e-6)
    for name, (group, i) in zip(names, places, strict=True):
        yield relative(f"final/{name}/weight", group.weight[i], case[f"final/{name}/weight"], 1e-6)
        yield relative(f"final/{name}/bias", group.bias[i], case[f"final/{name}/bias"], 1e-6)


def eval_transform(case: Case) -> Checks:
    image, norm = torch.from_numpy(case["image"]).permute(2, 0, 1), norm_of(case)
    yield "out", eval_pil(image, int(case["crop"]), int(case["resize"]), norm=norm), case["out"], 1e-6
    for key, values in zip(("mean", "std"), NORMS[norm], strict=True):
        yield key, values, case[key], 1e-12


def split_transform(case: Case) -> Checks:
    train, val = finegrained.split_validation(int(case["n"]))
    yield "train_idx", train, case["train_idx"], 0.0
    yield "val_idx", val, case["val_idx"], 0.0
    image, size = torch.from_numpy(case["image"]).permute(2, 0, 1), int(case["image_size"])
    yield "out", eval_pil(image, size, size, norm="clip"), case["out"], 1e-6


def _standardised(case: Case) -> finegrained.Standardised:
    return finegrained.standardise_splits(*(tensor(case[f"x_{part}"]) for part in ("train", "val", "test")))


def _statistics(case: Case, data: finegrained.Standardised) -> Checks:
    for part in ("train", "val", "trainval", "test"):
        yield relative(f"norm/x_{part}", getattr(data, part), case[f"norm/x_{part}"], 2e-6)


def accuracy_search(case: Case) -> Checks:
    data = _standardised(case)
    yield from _statistics(case, data)
    labels = tuple(torch.from_numpy(case[f"y_{part}"]) for part in ("train", "val", "test"))
    strengths = [float(c) for c in case["C_grid"]]
    if len(strengths) == len(finegrained.STRENGTHS):  # a case may search another grid
        yield relative("C_grid", finegrained.STRENGTHS, strengths, 2e-6)
    found = finegrained.transfer(data, labels, str(case["metric"]), strengths)
    in_samples = [_samples(case[part], str(case["metric"])) / 100 for part in ("y_val", "y_test")]
    gaps = np.abs(np.array(found.val_scores) - case["val_scores"]) * in_samples[0]
    yield "val_scores, samples apart", gaps, np.zeros(len(gaps)), 1.0 + 1e-9
    best = strengths[int(np.abs(np.log(np.array(strengths) / float(case["best_C"]))).argmin())]
    lost = (max(found.val_scores) - found.val_scores[strengths.index(best)]) * in_samples[0]
    yield "best_C, samples lost by it", lost, 0.0, 1.0 + 1e-9
    if found.strength != best:  # scores a sample apart may move the best one
        found = finegrained.transfer(data, labels, str(case["metric"]), [best])
    apart = abs(found.test_score - float(case["test_score"])) * in_samples[1]
    yield "test_score, samples apart", apart, 0.0, 1.0 + 1e-9


def _samples(labels: np.ndarray, metric: str) -> int:
    """Over how many samples a score is a mean: averaged by class, a sample of the smallest class weighs most."""
    counts = np.unique(labels, return_counts=True)[1]
    by_class = finegrained.METRICS[metric] is finegrained.mean_per_class
    return int(len(counts) * counts.min() if by_class else len(labels))


def voc_map(case: Case) -> Checks:
    yield from _statistics(case, _standardised(case))
    labels, scores = torch.from_numpy(case["y_test"]), torch.from_numpy(case["scores"])
    ap = finegrained.average_precisions(labels, scores)
    scale = 100.0 if float(case["ap"].max()) > 1 else 1.0  # per cent, or shares of one
    yield relative("ap", np.array(ap) * scale / 100, case["ap"], 2e-6)
    yield relative("map", finegrained.METRICS[str(case["metric"])](labels, scores), case["map"], 2e-6)


def finegrained_transfer(case: Case) -> Checks:
    """A transfer case by what it recorded: a search over strengths, or given scores."""
    yield from (accuracy_search if "C_grid" in case else voc_map)(case)


# -- dense prediction -----------------------------------------------------------------------------------------------


def dense_backbone(case: Case) -> Checks:
    state = {name: tensor(array) for name, array in case.below("p/").items()}
    dim, patch = state["cls_token"].shape[-1], int(case["patch"])
    depth_ = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    sides = [int(case[key]) // patch for key in ("img_native", "img_dense")]
    indices = [int(i) for i in case["out_indices"]]
    model = DenseBackbone(dim, depth_, int(case["heads"]), state["blocks.0.mlp.fc1.weight"].shape[0], patch,
                          (sides[1], sides[1]), indices).double().eval()  # fmt: skip
    yield "converted_keys", sorted(to_dense(state)), sorted(case["converted_keys"]), 0.0
    loaded = model.load_vit(state, (sides[0], sides[0]))
    yield "missing", sorted(loaded.missing), sorted(case["missing"]), 0.0
    yield "unexpected", sorted(loaded.unexpected), sorted(case["unexpected"]), 0.0
    yield relative("pos_embed_resized", model.pos_embed, case["pos_embed_resized"], 2e-6)
    with torch.no_grad():
        for i, table in case.below("rel_table_").items():
            model.layers[int(i)].attn.relative_position_bias_table.copy_(tensor(table))
        for i, maps in enumerate(model(tensor(case["x"]))):
            yield relative(f"out_{i}", maps.patch, case[f"out_{i}"], 2e-6)
            if f"out_cls_{i}" in case:
                yield relative(f"out_cls_{i}", maps.cls, case[f"out_cls_{i}"], 2e-6)


def upernet_head(case: Case) -> Checks:
    """Neck and head in evaluation mode, strictly with the recorded names."""
    states = {part: {name: tensor(array) for name, array in case.below(f"{part}/").items()}
              for part in ("neck", "head")}  # fmt: skip
    features = [tensor(case[f"feat_{i}"]) for i in range(sum(key.startswith("feat_") for key in case))]
    classes, width = states["head"]["conv_seg.weight"].shape[:2]
    dims = [x.shape[1] for x in features]
    parts = {"neck": ScaleNeck(dims[0]), "head": UperHead(dims, width, classes)}
    for name, part in parts.items():
        part.double().eval().load_state_dict(states[name], strict=True)
    with torch.no_grad():
        maps = parts["neck"](features)
        for i, each in enumerate(maps):
            yield relative(f"neck_out_{i}", each, case[f"neck_out_{i}"], 1e-6)
        yield relative("out", parts["head"](maps), case["out"], 1e-6)


def dense_lr_schedule(case: Case) -> Checks:
    settings = {"base": float(case["base_lr"]), "steps": int(case["total_iters"]), "warmup": int(case["warmup_iters"])}
    yield relative("lr", [warmup_linear(int(i), **settings) for i in case["iters"]], case["lr"], 1e-12)


def seg_layer_decay(case: Case) -> Checks:
    named = [(str(name), nn.Parameter(torch.empty([1] * int(ndim))))
             for name, ndim in zip(case["names"], case["ndim"], strict=True)]  # fmt: skip
    groups = dense.layer_decay_groups(named, int(case["depth"]), float(case["rate"]), float(case["base_wd"]))
    yield from _groups(case, groups, 1e-12)


def depth_param_groups(case: Case) -> Checks:
    """Only names decide, so every parameter is a vector."""
    named = [(str(name), nn.Parameter(torch.empty(1))) for name in case["names"]]
    yield from _groups(case, depth.depth_groups(named, float(case["base_wd"])), 1e-15)


def _groups(case: Case, groups: list[dict], tol: float) -> Checks:  # type: ignore[type-arg]
    of = {name: group for group in groups for name in group["names"]}
    lr = [of[str(name)]["lr_scale"] * float(case["base_lr"]) for name in case["names"]]
    yield relative("lr", lr, case["lr"], tol)
    yield relative("wd", [of[str(name)]["weight_decay"] for name in case["names"]], case["wd"], tol)


def slide(case: Case) -> Checks:
    weight = torch.from_numpy(case["w"])

    def network(x: Tensor) -> Tensor:
        """Formula of the folder's README."""
        rows, columns = torch.arange(x.shape[-2]).view(-1, 1), torch.arange(x.shape[-1])
        mean = x.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return torch.einsum("oc,bchw->bohw", weight, x) + 0.1 * columns * mean - 0.05 * rows

    run = dense.slide_flip if str(case["kind"]) == "depth" else dense.slide
    crop, stride = (tuple(int(n) for n in case[key]) for key in ("crop", "stride"))
    yield relative("out", run(network, torch.from_numpy(case["x"]), crop, stride), case["out"], 1e-6)


# -- depth ----------------------------------------------------------------------------------------------------------


def dpt_head(case: Case) -> Checks:
    state = {name: tensor(array) for name, array in case.below("p/").items()}
    count = sum(key.startswith("feat_") for key in case)
    widths = [state[f"reassemble_blocks.projects.{i}.conv.weight"].shape[0] for i in range(count)]
    out, width = state["conv_seg.weight"].shape[:2]
    head = DptHead(case["feat_0"].shape[1], widths, width, out).double().eval()
    head.load_state_dict(state, strict=True)
    with torch.no_grad():
        got = head([Maps(tensor(case[f"feat_{i}"]), tensor(case[f"cls_{i}"])) for i in range(count)])
    yield relative("out", got, case["out"], 1e-6)


def silog_loss(case: Case) -> Checks:
    pred = tensor(case["pred"]).requires_grad_()
    value = depth.silog(pred, tensor(case["target"]), float(case["eps"]))
    value.backward()
    yield relative("loss", value, case["loss"], 1e-6)
    yield relative("grad", pred.grad, case["grad"], 1e-6)


def depth_metric(case: Case) -> Checks:
    """Maps by the formula of the folder's README."""
    found, counts = [], []
    i, j = torch.arange(480, dtype=torch.float64).view(-1, 1), torch.arange(640, dtype=torch.float64)
    for a, b in case["ab"]:
        target = 5.5 + 5.2 * torch.sin(a * i + b * j)
        pred = (target * (1 + 0.15 * torch.cos(0.037 * i - 0.021 * j)) + 0.05).clamp(min=0.05)
        valid = depth.counted(target)
        counts.append(int(valid.sum()))
        found.append(depth.depth_metrics(pred, target, valid))
    yield "n_valid", counts, case["n_valid"], 0.0
    yield relative("values", [np.mean([f[str(name)] for f in found]) for name in case["names"]], case["values"], 1e-7)


UNITS: dict[str, Unit] = {
    "knn": knn,
    "linear_probe": linear_probe,
    "imagenet_eval": eval_transform,
    "finegrained": finegrained_transfer,
    "finegrained_accuracy": accuracy_search,
    "finegrained_split": split_transform,
    "finegrained_voc": voc_map,
    "dense_backbone": dense_backbone,
    "upernet": upernet_head,
    "dense_lr": dense_lr_schedule,
    "seg_layer_decay": seg_layer_decay,
    "slide": slide,
    "depth_param_groups": depth_param_groups,
    "dpt": dpt_head,
    "silog": silog_loss,
    "depth_metric": depth_metric,
}
