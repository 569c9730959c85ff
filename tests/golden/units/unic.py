"""Units of the UNIC cases: each hands a case's arrays to the product and pairs the results with the recorded ones."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import load
from core.data import views
from core.evaluate.knn import knn as weighted_knn
from core.evaluate.last_layers import feature_maps, last_layers
from core.evaluate.linear import split_trainval as split_by_class
from core.evaluate.linear import train_linear
from core.inputs import schedule
from core.losses import cosine_distance, drop_teachers, smooth_l1
from core.methods.unic import Unic, UnicModel, UnicOptions
from core.methods.unic import unic_loss as method_loss
from core.models import vit as vits
from core.models.features import take
from core.models.heads import KINDS, Ladder, Projector
from core.models.weights import to_timm
from core.optim import clip_per_parameter, decay_groups
from core.recipe import Train
from core.stats import RunningStats, merge_moments, moments, standardise
from tests.golden.networks import tensor, vit_from
from tests.golden.runner import Case, Check, Unit, elsewhere

Checks = Iterator[Check]
DRAWS = 50  # of dropped paths, in which each rule shows what it can draw


def loss_terms(case: Case) -> Checks:
    target, weight = tensor(case["in.target"]), tensor(case["in.weight"])
    for name, term in (("cos", cosine_distance), ("sl1", smooth_l1)):
        pred = tensor(case["in.pred"]).requires_grad_()
        value = term(pred, target)
        (value * weight).sum().backward()
        yield f"out.{name}", value, case[f"out.{name}"], 1e-10
        yield f"out.{name}_mean", value.mean(), case[f"out.{name}_mean"], 1e-10
        yield f"out.grad_{name}", pred.grad, case[f"out.grad_{name}"], 1e-10


def unic_loss(case: Case) -> Checks:
    teachers = [str(name) for name in case["in.teacher_order"]]
    student, target = (
        {t: {kind: tensor(case[f"in.{side}.{t}.{kind}"]) for kind in KINDS} for t in teachers}
        for side in ("student", "teacher")
    )
    for tokens in student.values():
        for x in tokens.values():
            x.requires_grad_()
    lam_cos, lam_sl1, p = (float(case[f"hp.{name}"]) for name in ("lam_cos", "lam_sl1", "t_drop_prob"))
    loss, report = method_loss(student, target, tensor(case["in.u"]), lam_cos, lam_sl1, p)
    loss.backward()
    yield "out.loss", loss, case["out.loss"], 1e-10
    yield "out.loss_per_image", report["loss_per_image"], case["out.loss_per_image"], 1e-10
    yield "out.coeff_sum", report["t_coeff"], case["out.coeff_sum"], 1e-10
    for t in teachers:
        for kind in KINDS:
            yield f"out.grad.{t}.{kind}", student[t][kind].grad, case[f"out.grad.{t}.{kind}"], 1e-10
    names = [str(name) for name in case["out.metric_names"]]
    yield "out.metric_names", [name for name in names if name in report], case["out.metric_names"], 0.0
    yield "out.metric_values", torch.stack([report[name] for name in names]), case["out.metric_values"], 1e-10


def teacher_drop(case: Case) -> Checks:
    """Rows are in sorted order of the teachers' names, whatever order a mapping has."""
    yield "in.names_sorted", sorted(str(n) for n in case["in.dict_order"]), case["in.names_sorted"], 0.0
    losses = tensor(case["in.losses"])
    for k, p in enumerate(case["hp.p"]):
        loss, keep = drop_teachers(losses, tensor(case[f"in.u.{k}"]), float(p))
        coeff = keep / keep.sum(dtype=torch.float64)
        yield f"out.loss.{k}", loss, case[f"out.loss.{k}"], 1e-12
        yield f"out.coeff.{k}", coeff, case[f"out.coeff.{k}"], 1e-12
        yield f"out.coeff_sum.{k}", coeff.sum(1), case[f"out.coeff_sum.{k}"], 1e-12


def teacher_norm(case: Case) -> Checks:
    floor = float(case["hp.eps"])
    for kind in KINDS:
        dim = case[f"in.{kind}.0"].shape[-1]
        stats = RunningStats(dim, floor).double()
        for k, momentum in enumerate(case["hp.momentum"]):
            z = tensor(case[f"in.{kind}.{k}"])
            yield f"out.{kind}.{k}", stats(z), case[f"out.{kind}.{k}"], 1e-6
            mean, std = merge_moments(moments(z).unsqueeze(0), z[..., 0].numel())
            stats.update(mean, std, float(momentum))
            yield f"out.{kind}.mean.{k}", stats.mean.clone(), case[f"out.{kind}.mean.{k}"].reshape(dim), 1e-6
            yield f"out.{kind}.std.{k}", stats.std.clone(), case[f"out.{kind}.std.{k}"].reshape(dim), 1e-6
        yield f"out.{kind}.no_ema", standardise(z, mean, std, floor), case[f"out.{kind}.no_ema"], 1e-6


def schedules(case: Case) -> Checks:
    """Steps and warm-up of a stage as the product counts them, and the values that the method has at each."""
    for key in (key for key in case if key.startswith("out.") and key.removeprefix("out.").isdigit()):
        base, final, epochs, iters, warmup = (float(v) for v in case[f"hp.{key.removeprefix('out.')}"])
        train = Train(epochs=int(epochs), batch=1, micro_batch=1, lr=base, lr_batch=0, min_lr=final,
                      warmup_epochs=warmup)  # fmt: skip
        method = _method(train, int(iters), momentum=(base, final))
        values = [method.schedules(step) for step in range(method.steps)]
        yield key, [each["lr"] for each in values], case[key], 1e-12
        if not warmup:  # the momentum of statistics has none
            yield f"{key} momentum", [each["tnorm_ema_momentum"] for each in values], case[key], 1e-12
    if "in.recipe_idx" not in case:
        return
    epochs, iters, warmup = (int(v) for v in case["hp.recipe"])
    recipe = load("unic-b")
    train = dataclasses.replace(recipe.stage(recipe.stage_names()[0]), epochs=epochs, warmup_epochs=warmup)
    method = _method(train, iters * train.batch)
    values = [method.schedules(int(step)) for step in case["in.recipe_idx"]]
    yield "out.recipe_lr", [each["lr"] for each in values], case["out.recipe_lr"], 1e-12
    momentum = [each["tnorm_ema_momentum"] for each in values]
    yield "out.recipe_momentum", momentum, case["out.recipe_momentum"], 1e-12


def _method(train: Train, samples: int, **options: Any) -> Unic:
    return Unic(UnicOptions(**options), *schedule(train, samples))


def clip_grad(case: Case) -> Checks:
    grads = {int(name): tensor(array) for name, array in case.below("in.grad.w").items()}
    norms = clip_per_parameter([grads.get(i) for i in range(max(grads) + 1)], float(case["hp.clip"]))
    yield "out.norms", norms, case["out.norms"], 1e-10
    for i, grad in grads.items():
        yield f"out.grad.w{i}", grad, case[f"out.grad.w{i}"], 1e-10


def lp(case: Case) -> Checks:
    teachers = {str(n): int(d) for n, d in zip(case["in.head_names"], case["in.head_dims"], strict=True)}
    depth, blocks = int(case["hp.n_blocks"]), [int(b) for b in case["hp.which_blocks"]]
    widths = int(case["hp.hidden"]), int(case["hp.last_hidden"])
    norms = bool(case["hp.prenorm"]), bool(case["hp.midnorm"])
    ladder = Ladder(case["in.cls.0"].shape[-1], teachers, blocks, depth, *widths, *norms).double()
    ladder.load_state_dict({name: tensor(array) for name, array in case.below("param.").items()}, strict=True)
    taps = [
        torch.cat([tensor(case[f"in.cls.{i}"])[:, None], tensor(case[f"in.patch.{i}"])], 1) for i in range(depth + 1)
    ]
    for tap in taps:
        tap.requires_grad_()
    out = ladder(taps)
    pairs = [(name, kind) for name in teachers for kind in KINDS]
    torch.autograd.backward([out[n][k] for n, k in pairs], [tensor(case[f"in.cot.{n}.{k}"]) for n, k in pairs])
    for name, kind in pairs:
        yield f"out.{name}.{kind}", out[name][kind], case[f"out.{name}.{kind}"], 1e-10
    for i, tap in enumerate(taps):
        if i - 1 in blocks:
            yield f"out.gcls.{i}", tap.grad[:, 0], case[f"out.gcls.{i}"], 1e-10
            yield f"out.gpatch.{i}", tap.grad[:, 1:], case[f"out.gpatch.{i}"], 1e-10
        else:
            yield f"gradient of unused tap {i}", tap.grad is None, True, 0.0


def student_encoder(case: Case) -> Checks:
    model = vit_from(case, reg_tokens=int(case["hp.registers"]), img_size=int(case["hp.img_size"])).eval()
    prefix, tol = model.num_prefix_tokens, 5e-6
    for k, (height, width) in enumerate(case["in.sizes"]):
        grid = (int(height) // int(case["hp.patch"]), int(width) // int(case["hp.patch"]))
        with torch.no_grad():
            taps = vits.forward_taps(model, tensor(case[f"in.image.{k}"]))
            normed, maps = last_layers(model, tensor(case[f"in.image.{k}"]), 1), _maps(case, model, k)
        yield f"out.pos_embed.{k}", vits.pos_embed_for(model, grid), case[f"out.pos_embed.{k}"], tol
        for i, tap in enumerate(taps):
            yield f"out.tap_cls.{k}.{i}", tap[:, 0], case[f"out.tap_cls.{k}.{i}"], tol
            yield f"out.tap_patch.{k}.{i}", tap[:, prefix:], case[f"out.tap_patch.{k}.{i}"], tol
        yield f"out.x_norm_cls.{k}", normed[-1][:, 0], case[f"out.x_norm_cls.{k}"], tol
        yield f"out.x_norm_patch.{k}", normed[-1][:, prefix:], case[f"out.x_norm_patch.{k}"], tol
        for j, image in enumerate(maps):
            yield f"out.seg_map.{k}.{j}", image, case[f"out.seg_map.{k}.{j}"], tol


def _maps(case: Case, model: nn.Module, k: int) -> list[Tensor]:
    """As many of the last blocks' maps as are recorded of an image."""
    count = sum(key.startswith(f"out.seg_map.{k}.") for key in case)
    return feature_maps(model, tensor(case[f"in.image.{k}"]), count) if count else []


def drop_path(case: Case) -> Checks:
    depth, rate = int(case["hp.depth"]), float(case["hp.drop_path_rate"])
    model = vit_from(case, embed=False).train()
    vits.set_drop_path(model, rate)
    yield "out.rates", vits.drop_rates(rate, depth), case["out.rates"], 1e-12
    yield "out.kind", [block.drop_path1.rule for block in model.blocks], case["out.kind"], 0.0
    x = tensor(case["in.tokens"])
    for i, block in enumerate(model.blocks):
        for j, path in enumerate((block.drop_path1, block.drop_path2)):
            scale, kept = case["in.scale"][i, j], int(case["out.kept"][i, j])
            if path.rule != "none":
                own = torch.stack([path.draw(len(x), x.device) for _ in range(DRAWS)])
                yield f"scale of block {i}, branch {j}", own.max(), scale.max(), 1e-7
            if path.rule == "subset":
                yield f"out.kept of block {i}, branch {j}", (own > 0).sum(1).unique(), [kept], 0.0
            path.draw = _recorded(tensor(scale))
        x = block(x)
        yield f"out.block.{i}", x, case[f"out.block.{i}"], 1e-7


def _recorded(scale_B: Tensor) -> Callable[[int, torch.device], Tensor]:
    return lambda batch, device: scale_B


def teacher(layout: str, cls: str) -> Unit:
    def unit(case: Case) -> Checks:
        model, images = vit_from(case, layout=layout).eval(), tensor(case["in.image"])
        with torch.no_grad():
            got_cls, got_patch = take(model, images, cls)
            prenorm = vits.forward_taps(model, images)[-1]
        yield "out.cls", got_cls, case["out.cls"], 1e-10
        yield "out.patch", got_patch, case["out.patch"], 1e-10
        yield "out.prenorm", prenorm, case["out.prenorm"], 1e-10

    return unit


def param_groups(case: Case) -> Checks:
    """Names and shapes come from the product's student and ladder at the recorded sizes, groups from its rule."""
    names = [str(name) for name in case["out.names"]]
    shapes = {name: [int(n) for n in str(s).split("x")] for name, s in zip(names, case["out.shapes"], strict=True)}
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own = dict(_trainable(meta).named_parameters())
    own["encoder.mask_token"] = nn.Parameter(meta["encoder.mask_token"])  # never used, so the product leaves it out
    released = {name: name if name in own else _in_timm(name) for name in names}
    yield "names", sorted(released.values()), sorted(own), 0.0
    in_release = {ours: theirs for theirs, ours in released.items()}
    yield "out.names", sorted(in_release[name] for name in own), sorted(names), 0.0
    yield "out.shapes", ["x".join(map(str, own[released[n]].shape)) for n in names], case["out.shapes"], 0.0
    groups = decay_groups(own.items(), float(case["hp.wd"][0]))
    group_of = {name: i for i, group in enumerate(groups) for name in group["names"]}
    yield "out.group", [group_of[released[name]] for name in names], case["out.group"], 0.0
    yield "hp.wd", [group["weight_decay"] for group in groups], case["hp.wd"], 0.0
    yield "out.n_params", [sum(p.numel() for p in group["params"]) for group in groups], case["out.n_params"], 0.0
    for part, key in (("encoder.", "out.n_encoder"), ("lp.", "out.n_lp")):
        yield key, sum(p.numel() for name, p in own.items() if name.startswith(part)), case[key], 0.0
    out, hidden, dim = _projector_sizes(shapes)
    drawn = Projector(dim, hidden, out)
    stds = [float(layer.weight.detach().std()) for layer in (drawn.first, drawn.second)]
    yield "out.lp_std", stds, case["out.lp_std"], max(1e-4, 4 * stds[0] / math.sqrt(hidden * min(dim, out)))


def _projector_sizes(shapes: dict[str, list[int]]) -> tuple[int, int, int]:
    """Outputs, hidden units and inputs of the first projector."""
    first = next(name for name in shapes if re.search(r"\.layers\.\d\.weight$", name) and len(shapes[name]) == 2)
    second = re.sub(r"\d(?=\.weight)", lambda at: str(int(at[0]) + 2), first)
    return shapes[second][0], *shapes[first]


def _in_timm(name: str) -> str:
    return f"encoder.{next(iter(to_timm({name: torch.empty(0)}, 'unic')))}"


def _trainable(meta: dict[str, Tensor]) -> nn.Module:
    state = to_timm(meta, "unic")
    firsts = {n.split(".")[2]: t for n, t in meta.items() if n.startswith("lp.") and ".cls.0.layers.2.weight" in n}
    teachers = {name: weight.shape[0] for name, weight in firsts.items()}
    name, depth = next(iter(teachers)), len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    hidden, last = (meta[f"lp.heads.{name}.cls.{block}.layers.0.weight"].shape[0] for block in (0, depth - 1))
    with torch.device("meta"):
        model = vit_from(state=state, heads=1)
        ladder = Ladder(state["cls_token"].shape[-1], teachers, range(depth), depth, hidden, last)
        return UnicModel(model, ladder, prefix=1).requires_grad_(True)


def knn(case: Case) -> Checks:
    arrays = [tensor(case[f"in.{name}"]) for name in ("train", "train_labels", "test", "test_labels")]
    ks = [int(k) for k in case["hp.k"]]
    settings = {"num_classes": int(case["hp.num_classes"]), "chunk": int(case["hp.chunk"])}
    for i, (top1, top5, pred) in enumerate(weighted_knn(*arrays, ks, float(case["hp.T"]), **settings).values()):
        yield f"out.top1.{i}", top1, case[f"out.top1.{i}"], 1e-9
        yield f"out.top5.{i}", top5, case[f"out.top5.{i}"], 1e-9
        yield f"out.pred.{i}", pred.unsqueeze(1), case[f"out.pred.{i}"], 0.0


def logreg_sgd(case: Case) -> Checks:
    fitted = train_linear(
        tensor(case["in.train"]), tensor(case["in.train_labels"]), [float(case["hp.lr"])], [float(case["hp.wd"])],
        weight_CD=tensor(case["in.W0"]), bias_C=tensor(case["in.b0"]),
        orders=tensor(case["in.orders"])[: int(case["hp.epochs"])], momentum=float(case["hp.momentum"]),
        batch=int(case["hp.batch"]),
    )  # fmt: skip
    yield "out.W", fitted.weight[0], case["out.W"], 1e-9
    yield "out.b", fitted.bias[0], case["out.b"], 1e-9
    yield "out.pred", fitted.logits(tensor(case["in.test"]))[0].argmax(-1), case["out.pred"], 0.0
    yield "out.lr_used", fitted.lr_used[0], case["out.lr_used"], 1e-9


def split_trainval(case: Case) -> Checks:
    shuffled = {int(c): tensor(index) for c, index in case.below("in.shuffled.").items()}
    train, val = split_by_class(shuffled, float(case["hp.per_val"]), released_bug=True)
    yield "out.train_inds", train, case["out.train_inds"], 0.0
    yield "out.val_inds", val, case["out.val_inds"], 0.0
    yield "out.n_val", np.unique(case["in.labels"][val.numpy()], return_counts=True)[1], case["out.n_val"], 0.0


def center_pad(case: Case) -> Checks:
    rows = [views.center_pad(height, width, multiple) for multiple, height, width in case["in.multiple_h_w"].tolist()]
    yield "out.h_w_top_bottom_left_right", rows, case["out.h_w_top_bottom_left_right"], 0.0


UNITS: dict[str, Unit] = {
    "loss_terms": loss_terms,
    "unic_loss": unic_loss,
    "teacher_drop": teacher_drop,
    "teacher_norm": teacher_norm,
    "schedules": schedules,
    "clip_grad": clip_grad,
    "lp_": lp,
    "student_encoder": student_encoder,
    "drop_path": drop_path,
    "teacher_dino": teacher("dino", "token"),
    "teacher_ibot": teacher("ibot", "token"),
    "teacher_deit3": teacher("deit3", "token"),
    "teacher_dbotft": teacher("dbot_ft", "pooled"),
    "param_groups": param_groups,
    "train_steps": elsewhere("steps", "train_steps"),
    "ddp2_train": elsewhere("steps", "ddp2_train"),
    "augment": elsewhere("augment", "augment"),
    "knn": knn,
    "logreg_sgd": logreg_sgd,
    "split_trainval": split_trainval,
    "center_pad": center_pad,
}
