"""Units of the Feature-Distillation cases: each hands a case's arrays to the product and pairs the results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.data import mix, pillow
from core.evaluate import diagnostics, landscape, lars_probe
from core.losses import soft_cross_entropy
from core.methods.base import Batch, Features
from core.methods.fd import Fd, FdOptions, tokens_of, whiten
from core.methods.finetune import Classifier
from core.models import vit as vits
from core.models.drop_path import SampleDropPath, use_sample_drop_path
from core.models.fused import fuse_attention
from core.models.rel_pos import relative_bias, relative_index, resize_table
from core.models.students import create
from core.models.teachers import FrozenTeacher
from core.models.weights import to_timm
from core.recipe import Teacher, Train
from tests.golden.networks import tensor
from tests.golden.networks_fd import (
    CLIP,
    SWIN,
    VIT,
    describe,
    described,
    in_module,
    in_timm,
    loaded,
    meta,
    params,
    plain_vit,
    sides,
    student,
    swin,
)
from tests.golden.runner import Case, Check, Unit, elsewhere

Checks = Iterator[Check]


def clip_renorm(case: Case) -> Checks:
    """The product folds the change of statistics into a teacher's patch embedding: here one that copies pixels."""
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv2d(3, 3, 1, bias=False)
    model.patch_embed.proj.weight.data = torch.eye(3).view(3, 3, 1, 1)
    info = describe(3, 0, 1, case["x"].shape[-1], is_vit=False)
    FrozenTeacher(Teacher(name=CLIP, weights="random", normalize="own"), model, info, info)
    yield "y", model.patch_embed.proj(torch.from_numpy(case["x"])), case["y"], 1e-6


def clip_teacher_fwd(case: Case) -> Checks:
    hp = meta(case)
    model = plain_vit(to_timm(params(case), "clip"), hp["heads"], hp["res"], CLIP, hp.get("norm_eps"))
    info = described(model, hp["res"])
    yield "sizes", [info.dim, info.depth, info.patch], [hp["width"], hp["layers"], hp["patch"]], 0.0
    teacher = FrozenTeacher(Teacher(name=CLIP, weights="random", normalize="own"), model, info, info)
    x = tensor(case["x"])
    features = teacher(x)
    post = torch.cat([features.cls[:, None], features.patch], 1)
    with torch.no_grad():
        yield "raw", vits.forward_taps(model, x)[-1], case["raw"], 5e-6
    yield "post", post, case["post"], 5e-6
    yield "whitened", whiten(post), case["whitened"], 5e-6


def vit_teacher_fwd(case: Case) -> Checks:
    hp = meta(case)
    model = plain_vit(to_timm(params(case), "dino"), hp["num_heads"], hp["img_size"], norm_eps=hp.get("norm_eps"))
    info = described(model, hp["img_size"])
    yield "sizes", [info.dim, info.depth, info.patch], [hp["embed_dim"], hp["depth"], hp["patch_size"]], 0.0
    features = FrozenTeacher(Teacher(name=VIT, weights="random"), model, info, info)(tensor(case["x"]))
    with torch.no_grad():
        yield "raw", vits.forward_taps(model, tensor(case["x"]))[-1], case["raw"], 1e-11
    yield "post", torch.cat([features.cls[:, None], features.patch], 1), case["post"], 1e-11


def swin_teacher_fwd(case: Case) -> Checks:
    hp = meta(case)
    model = loaded(swin(hp, SWIN), params(case), "swin")
    found: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    info = described(model, hp["img_size"])
    teacher = FrozenTeacher(Teacher(name=SWIN, weights="random", cls="pooled"), model, info, info)
    post = teacher(tensor(case["x"])).patch
    yield "raw", found[0].flatten(1, 2), case["raw"], 1e-11
    yield "post", post, case["post"], 1e-11


def vit_student_fwd(case: Case) -> Checks:
    """Biases of keys add the same to all scores of a query: the product has none, and their gradients are 0."""
    model = loaded(student(meta(case)), params(case), "beit").train()
    fuse_attention(model)
    z = tokens_of(model, tensor(case["x"]))
    yield "z", z, case["z"], 1e-11
    (z * tensor(case["probe"])).sum().backward()
    own = dict(model.named_parameters())
    for name, want in case.below("grad/").items():
        found = in_timm(name, "beit")
        yield f"grad/{name}", own[found].grad if found else np.zeros_like(want), want, 1e-11


def vit_student_droppath(case: Case) -> Checks:
    model = loaded(student(meta(case)), params(case), "beit").train()
    use_sample_drop_path(model)
    fuse_attention(model)
    paths = [(block.drop_path1, block.drop_path2) for block in model.blocks]
    yield "rates", [getattr(first, "rate", 0.0) for first, _ in paths], case["rates"], 1e-6
    active = [path for pair in paths for path in pair if isinstance(path, SampleDropPath)]
    for path, keep in zip(active, case["keep"], strict=True):
        path.draw = _given(tensor(keep).double() / (1.0 - path.rate))
    yield "z", tokens_of(model, tensor(case["x"])), case["z"], 1e-6


def _given(scale_B: Tensor) -> Any:
    return lambda batch, device: scale_B


def swinv2_student_fwd(case: Case) -> Checks:
    hp = meta(case)
    model = loaded(student(hp), params(case), "swin")
    x = tensor(case["x"])
    for name, want in case.below("coords/").items():
        yield f"coords/{name}", dict(model.named_buffers())[name], want, 5e-5
    with torch.no_grad():
        if not hp.get("use_shared_rel_pos_bias"):
            yield "z by timm", tokens_of(model, x), case["z"], 5e-5
        fuse_attention(model)
        yield "z", tokens_of(model, x), case["z"], 5e-5


def vit_finetune_fwd(case: Case) -> Checks:
    model, x = classifier(case), tensor(case["x"])
    with torch.no_grad():
        yield "features", model.encoder(x), case["features"], 1e-11
        yield "logits", model(Batch({"image": x})), case["logits"], 1e-11


def classifier(case: Case, prefix: str = "param/") -> Classifier:
    """The fine-tuning network with a case's weights, in float64 and evaluation mode."""
    hp, state = meta(case), params(case, prefix)
    network = student(hp)
    model = Classifier(network, network.num_features, hp["num_classes"]).double().eval()
    fuse_attention(model)
    model.load_state_dict({in_module(k, hp): v for k, v in state.items() if in_module(k, hp)})
    return model


def whiten_smooth_l1(case: Case) -> Checks:
    hp = meta(case)
    width = case["teacher_raw"].shape[-1]
    sizes = {"embed_dim": width, "num_heads": 1, "depth": 0, "img_size": 16, "norm_eps": hp["teacher_norm_eps"]}
    norm: Any = create(VIT, sizes, None, "teacher").norm.double().requires_grad_(False)
    norm.load_state_dict({"weight": tensor(case["teacher_norm_weight"]), "bias": tensor(case["teacher_norm_bias"])})
    after = norm(tensor(case["teacher_raw"]))
    yield "teacher_after_norm", after, case["teacher_after_norm"], 1e-12
    settings = Train(precision="fp32")
    method, batch = Fd(FdOptions(beta=hp["beta"], whiten_eps=hp["whiten_eps"]), settings, 1), Batch({})
    patches = after.shape[1] - 1
    info = describe(case["z"].shape[-1], 1, 1, patches)
    model = method.build(nn.Identity(), info, {"teacher": describe(width, 1, 1, patches)}).double()
    method._grid = method._grids["teacher"] = (1, patches)  # the case has tokens and no image
    (target,) = method.targets({"teacher": Features(after[:, 0], after[:, 1:])}, batch)
    yield "whitened", target, case["whitened"], 1e-12
    weight, bias = tensor(case["decoder_weight"]), tensor(case["decoder_bias"])
    model.load_state_dict({"decoder.0.weight": weight.squeeze(-1), "decoder.0.bias": bias})
    z = tensor(case["z"]).requires_grad_()
    rec = model.decoder[0](z)
    loss = method.losses([rec], [target], batch)[0]
    loss.backward()
    yield "rec", rec, case["rec"], 1e-12
    yield "loss", loss, case["loss"], 1e-12
    yield "grad_z", z.grad, case["grad_z"], 1e-12
    yield "grad_decoder_weight", model.decoder[0].weight.grad[..., None], case["grad_decoder_weight"], 1e-12
    yield "grad_decoder_bias", model.decoder[0].bias.grad, case["grad_decoder_bias"], 1e-12


def rel_pos_bias(case: Case) -> Checks:
    hp = meta(case)
    index = relative_index(tuple(hp["window"]), hp["cls"])
    yield "index", index, case["index"], 0.0
    if "table" in case:
        yield "bias", relative_bias(tensor(case["table"]), index), case["bias"], 0.0


def rpb_interp(case: Case) -> Checks:
    hp = meta(case)
    old, new = (sides(hp[f"{side}_grid"]) for side in ("src", "dst"))
    yield "dst_table", resize_table(torch.from_numpy(case["src_table"]), old, new), case["dst_table"], 1e-5


def pos_embed_interp(case: Case) -> Checks:
    hp = meta(case)
    old, new = (sides(hp[f"{side}_grid"]) for side in ("src", "dst"))
    prefix = case["src"].shape[1] - old[0] * old[1]
    got = vits.resize_pos_embed(torch.from_numpy(case["src"]), old, new, prefix, offset=None)
    yield "dst", got, case["dst"], 1e-5


def _image(case: Case) -> Tensor:
    return torch.from_numpy(case["image"]).permute(2, 0, 1).contiguous()


def _interpolation(hp: dict[str, Any]) -> str:
    return str(hp["interpolation"]).rpartition(".")[2].lower()


def pretrain_transform(case: Case) -> Checks:
    hp = meta(case)
    norm = hp.get("mean", "imagenet")
    y = pillow.standardised(
        pillow.crop_pil(_image(case), hp["i_j_h_w"], hp["flip"], hp["size"], _interpolation(hp)), norm
    )
    yield "y", y, case["y"], 1e-6


def eval_transform(case: Case) -> Checks:
    hp = meta(case)
    y = pillow.eval_pil(_image(case), hp["size"], hp.get("resize", 0), _interpolation(hp), hp.get("mean", "clip"))
    yield "y", y, case["y"], 1e-6


def rrc_tf_style(case: Case) -> Checks:
    columns = dict(zip(meta(case)["columns"].split(","), case["draws"].T, strict=True))
    hp = meta(case)
    sizes = np.stack([columns["H"], columns["W"]], 1).astype(np.int64)
    crop = pillow.clipped_sizes(sizes, columns["area_fraction"], columns["log_aspect"])
    low, high = np.log(hp["ratio"])
    start, end = hp["scale"]
    places = (np.stack([columns["top_draw"], columns["left_draw"]], 1) + 0.5) / (sizes - crop + 1)
    spans = (end - start) or 1.0, (high - low) or 1.0  # a range of one value draws nothing
    u = np.stack([(columns["area_fraction"] - start) / spans[0], (columns["log_aspect"] - low) / spans[1]], 1)
    boxes = pillow.clipped_boxes(sizes, np.concatenate([u, places], 1), tuple(hp["scale"]), tuple(hp["ratio"]))
    yield "ijhw", boxes, case["ijhw"], 0.0


def mixup_cutmix(case: Case) -> Checks:
    hp = meta(case)
    x, labels = torch.from_numpy(case["x"]), torch.from_numpy(case["target"])
    classes, smoothing = hp["num_classes"], hp["smoothing"]
    blend = mix.Mix(float(case["mixup_lam"]))
    top, bottom, left, right = (int(edge) for edge in case["cutmix_box_yl_yh_xl_xh"])
    share = mix.pasted_share((top, bottom, left, right), (x.shape[-2], x.shape[-1]))
    paste = mix.Mix(share, (top, bottom, left, right))
    yield "cutmix_lam", share, case["cutmix_lam"], 1e-6
    for name, how in (("mixup", blend), ("cutmix", paste)):
        target = mix.mix_labels(labels, classes, how.share, smoothing)
        yield f"{name}_x", mix.mix_images(x, how), case[f"{name}_x"], 1e-6
        yield f"{name}_target", target, case[f"{name}_target"], 1e-6
        if name == "mixup":
            logits = tensor(case["logits"]).requires_grad_()
            loss = soft_cross_entropy(logits, target)
            loss.backward()
            yield "soft_ce_on_mixup_target", loss, case["soft_ce_on_mixup_target"], 1e-6
            yield "soft_ce_grad", logits.grad, case["soft_ce_grad"], 1e-6


def diag_attention(case: Case) -> Checks:
    hp = meta(case)
    grid = sides(hp["grid"])
    prefix = case["attn"].shape[-1] - grid[0] * grid[1]
    layers = []
    for maps in case["attn"]:
        own = diagnostics.Diagnostics(grid, hp["patch_px"], prefix)
        for image in torch.from_numpy(maps).split(1):
            own.add(image)
        layers.append(own.results())
    for name, key in (("mean_distance", "distance"), ("mean_distance_no_renorm", "distance_unnormalised"),
                      ("head_cosine_rows", "head_cosine_rows"), ("head_cosine_maps", "head_cosine_maps"),
                      ("mean_map", "mean_map")):  # fmt: skip
        yield name, torch.stack([layer[key] for layer in layers]), case[name], 1e-6


def landscape_tiny(case: Case) -> Checks:
    model = classifier(case)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    directions = []
    for number in (1, 2):
        raw = {in_module(name, meta(case)): value for name, value in params(case, f"raw{number}/").items()}
        directions.append(landscape.filter_normalised({name: raw[name] for name in weights}, weights))
    parts = {"head": "head.weight", "patch": "encoder.patch_embed.proj.weight"}
    for key in (key for key in case if re.fullmatch(r"dir\d_(head|patch)", key)):
        yield key, directions[int(key[3]) - 1][parts[key[5:]]], case[key], 1e-10
    measure = landscape.classification(tensor(case["x"]), tensor(case["y"]))
    wrapped = _OnImages(model)
    moved = tuple({f"model.{name}": value for name, value in each.items()} for each in directions)
    loss, hits = landscape.surface(wrapped, moved, [float(a) for a in case["alphas"]], measure)
    yield "loss", loss, case["loss"], 1e-10
    yield "acc", hits, case["acc"], 1e-10


class _OnImages(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(Batch({"image": images}))
        return logits


def linear_probe_steps(case: Case) -> Checks:
    hp, weight = meta(case), tensor(case["weight0"])
    model = lars_probe.LarsProbe(weight.shape[1], weight.shape[0], hp["bn_eps"], hp["bn_momentum"]).double()
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(tensor(case["bias0"]))
    rates = np.broadcast_to(hp["lr"], len(case["x"])).tolist()  # one for all steps, or one each
    batches = [(tensor(x), tensor(y), lr) for x, y, lr in zip(case["x"], case["y"], rates, strict=True)]
    settings = {"weight_decay": hp["weight_decay"], "momentum": hp["momentum"], "trust": hp["trust"]}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for count in range(1, len(batches) + 1):
        model.load_state_dict(start)
        losses = lars_probe.fit_probe(model, batches[:count], **settings)
        yield f"weights after {count}", model.linear.weight.detach().clone(), case["weights"][count - 1], 1e-11
        yield f"biases after {count}", model.linear.bias.detach().clone(), case["biases"][count - 1], 1e-11
    yield "losses", torch.stack(losses), case["losses"], 1e-11
    yield "running_mean", model.norm.running_mean, case["running_mean"], 1e-11
    yield "running_var", model.norm.running_var, case["running_var"], 1e-11
    yield "eval_logits", model(batches[0][0]), case["eval_logits"], 1e-11


UNITS: dict[str, Unit] = {
    "clip_renorm": clip_renorm,
    "clip_teacher": clip_teacher_fwd,
    "vit_teacher": vit_teacher_fwd,
    "swin_teacher": swin_teacher_fwd,
    "vit_student_fwd": vit_student_fwd,
    "vit_student_droppath": vit_student_droppath,
    "swinv2_student": swinv2_student_fwd,
    "vit_finetune_fwd": vit_finetune_fwd,
    "whiten_smooth_l1": whiten_smooth_l1,
    "rel_pos_": rel_pos_bias,
    "rpb_interp": rpb_interp,
    "pos_embed_interp": pos_embed_interp,
    "pretrain_transform": pretrain_transform,
    "eval_transform": eval_transform,
    "rrc_tf_style": rrc_tf_style,
    "mixup_cutmix": mixup_cutmix,
    "diag_attention": diag_attention,
    "landscape": landscape_tiny,
    "linear_probe": linear_probe_steps,
    "groups_pretrain": elsewhere("rules_fd", "groups_pretrain"),
    "groups_finetune": elsewhere("rules_fd", "groups_finetune"),
    "init_stats": elsewhere("rules_fd", "init_stats"),
    "load_pretrained_keys": elsewhere("rules_fd", "load_pretrained_keys"),
    "lr_pretrain": elsewhere("rules_fd", "lr_pretrain"),
    "lr_finetune": elsewhere("rules_fd", "lr_finetune"),
    "resolved_configs": elsewhere("rules_fd", "resolved_configs"),
    "train_steps_fd": elsewhere("steps_fd", "train_steps_fd"),
    "train_steps_finetune": elsewhere("steps_fd", "train_steps_finetune"),
}
