"""Weights that the methods' papers name: teachers they distil from and students they released. Imports no torch.

No hash stands here: that of a file is recorded when it is first used (`core.models.locate`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Status = Literal["golden", "keys only", "unverified"]
Part = TypeVar("Part")
UNSTATED = "see upstream"
TOKENS = "class token and patches after the final norm"
POOLED = "final norm of the mean of the patches; patches as the last block leaves them"
PROJECTED = "class token, final norm, projection"
MAP = "map of patches after the final norm, no class token"
MEAN = "mean of the patches after the final norm, projection"


@dataclass(frozen=True)
class Known:
    """One set of weights.

    weights: what a recipe's weights field says; `store:` files have to be put there first.  source: the upstream file.
    targets: how its features are taken, with the teacher's field `cls`.  layout: of the upstream file, see
    core.models.layouts.  case: golden case whose forward pass the conversion of this layout reproduces; without one,
    `keys only`: names and shapes are known from the documents, `unverified`: not even these.
    """

    timm: str
    weights: str
    source: str
    licence: str
    layout: str
    case: str = ""
    targets: str = TOKENS
    cls: str = "token"
    args: dict[str, Any] = field(default_factory=dict)  # of timm.create_model, and norm_eps
    unverified: bool = False

    @property
    def status(self) -> Status:
        return "golden" if self.case else "unverified" if self.unverified else "keys only"


def _dinov2(size: str, letter: str, case: str, registers: bool = False) -> Known:
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    file = f"dinov2_vit{letter}14/dinov2_vit{letter}14_{'reg4_' if registers else ''}pretrain.pth"
    upstream = f"https://dl.fbaipublicfiles.com/dinov2/{file}"
    return Known(name, f"hub:timm/{name}.lvd142m", upstream, "Apache-2.0", "dinov2", case)


def _clip(arch: str, file: str, case: str) -> Known:
    source = f"OpenAI {file}.pt (TorchScript archive), visual.*"
    name, hub = f"vit_{arch}_clip_quickgelu_224", f"hub:timm/vit_{arch}_clip_224.openai"
    return Known(name, hub, source, "MIT", "clip", case)


def _proteus(name: str, timm: str, **args: Any) -> Known:
    source, args = "Proteus release, student.backbone.* below 'model'", {"img_size": 224, "init_values": 1.0, **args}
    return Known(
        timm, f"store:weights/proteus_{name}.pth", source, UNSTATED, "proteus", "proteus/loss_dinov2", args=args
    )


def _fd(name: str, timm: str, case: str, args: dict[str, Any], targets: str = TOKENS) -> Known:
    cls = "token" if targets == TOKENS else "pooled"
    source = "Feature-Distillation release, encoder.* below 'model'"
    return Known(timm, f"store:weights/fd_{name}.pth", source, UNSTATED, "fd", case, targets, cls, args)


FD_VIT: dict[str, Any] = {
    "use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False,
    "init_values": 0.1,
}  # fmt: skip
DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
DEIT_URL = "https://dl.fbaipublicfiles.com/deit"
SWIN_TEACHER = "fd/swin_teacher_fwd"

TEACHERS: dict[str, Known] = {
    "dino-b16": Known("vit_base_patch16_224", "hub:timm/vit_base_patch16_224.dino", DINO_URL, "Apache-2.0", "dino",
                      "unic/teacher_dino"),
    "ibot-b16": Known("vit_base_patch16_224", "store:weights/ibot_vitbase_16.pth",
                      "iBOT ViT-B/16 random mask, checkpoint_teacher.pth", UNSTATED, "ibot", "unic/teacher_dino"),
    "deit-b16": Known("deit_base_patch16_224", "hub:timm/deit_base_patch16_224.fb_in1k",
                      f"{DEIT_URL}/deit_base_patch16_224-b5f2ef4d.pth", "Apache-2.0", "timm", "fd/vit_teacher_fwd"),
    "deit3-b16": Known("deit3_base_patch16_224", "hub:timm/deit3_base_patch16_224.fb_in1k",
                       f"{DEIT_URL}/deit_3_base_224_1k.pth", "Apache-2.0", "deit3", "unic/teacher_deit3"),
    "dbot-ft-b16": Known("vit_base_patch16_224", "store:weights/dbotft_vitbase_16.pth",
                         "dBOT 84.5_dbot_base_finetune.pth", UNSTATED, "dbot_ft", "unic/teacher_dbotft", POOLED,
                         "pooled", {"global_pool": "avg"}),
    "dinov2-s14": _dinov2("small", "s", "proteus/backbone_dinov2"),
    "dinov2-b14": _dinov2("base", "b", "proteus/backbone_dinov2"),
    "dinov2-l14": _dinov2("large", "l", "proteus/backbone_dinov2"),
    "dinov2-g14": _dinov2("giant", "g", "proteus/backbone_dinov2_giant"),
    "dinov2-s14-reg": _dinov2("small", "s", "", registers=True),
    "dinov2-b14-reg": _dinov2("base", "b", "", registers=True),
    "dinov2-l14-reg": _dinov2("large", "l", "", registers=True),
    "dinov2-g14-reg": _dinov2("giant", "g", "", registers=True),
    "clip-b16": _clip("base_patch16", "ViT-B-16", "fd/clip_teacher_fwd"),
    "clip-b32": _clip("base_patch32", "ViT-B-32", "dime_fm/vit_forward_a"),
    "clip-l14": _clip("large_patch14", "ViT-L-14", "proteus/backbone_clip"),
    "metaclip-h14": Known("vit_huge_patch14_clip_quickgelu_224", "hub:timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
                          "MetaCLIP H/14 2.5B, OpenCLIP keys", "CC-BY-NC-4.0", "clip"),
    "synclr-b16": Known("vit_base_patch16_224", "store:weights/synclr_vit_b_16.pth",
                        "SynCLR release, module.visual.*", UNSTATED, "synclr", "proteus/backbone_synclr"),
    "synclr-l14": Known("vit_large_patch14_224", "store:weights/synclr_vit_l_14.pth",
                        "SynCLR release, module.visual.*", UNSTATED, "synclr", "proteus/backbone_synclr"),
    "esvit-swin-b14": Known("swin_base_patch4_window7_224", "store:weights/esvit_swin_base_w14.pth",
                            "EsViT Swin-B W=14 checkpoint_best.pth, key student", UNSTATED, "esvit", SWIN_TEACHER, MAP,
                            "pooled", {"window_size": 14}),
}  # fmt: skip

STUDENTS: dict[str, Known] = {
    "unic-b": Known("vit_base_patch16_224", "store:weights/unic.pth", "UNIC release, unic.pth", "CC-BY-NC-SA-4.0",
                    "unic", "unic/student_encoder"),
    "unic-l": Known("vit_large_patch14_224", "store:weights/unic_l.pth", "UNIC release, unic_l.pth", "CC-BY-NC-SA-4.0",
                    "unic", "unic/student_encoder", args={"img_size": 336}),
    "proteus-ti": _proteus("ti", "vit_tiny_patch16_224", patch_size=14),
    "proteus-s": _proteus("s", "vit_small_patch14_dinov2"),
    "proteus-b": _proteus("b", "vit_base_patch14_dinov2"),
    "proteus-l": _proteus("l", "vit_large_patch14_dinov2"),
    "fd-clip-b": _fd("clip_b", "beit_base_patch16_224", "fd/vit_student_fwd", FD_VIT),
    "fd-clip-l": _fd("clip_l", "beit_large_patch16_224", "fd/vit_student_fwd", {"patch_size": 14, **FD_VIT}),
    "fd-dino-b": _fd("dino_b", "beit_base_patch16_224", "fd/vit_student_fwd", FD_VIT),
    "fd-deit-b": _fd("deit_b", "beit_base_patch16_224", "fd/vit_student_fwd", FD_VIT),
    "fd-esvit-swin-b": _fd("esvit_swin_b", "swinv2_base_window8_256", "fd/swinv2_student_fwd",
                           {"img_size": 224, "window_size": 14}, MAP),
    "dime-fm-b32": Known("vit_base_patch32_clip_quickgelu_224", "store:weights/dime_fm_vitb32.pth",
                         "DIME-FM release, image_encoder.* and image_projection below 'model'", UNSTATED, "dime_fm",
                         "dime_fm/released_layout_a", PROJECTED, "projected",
                         {"num_classes": 768, "norm_eps": 1e-12}),
    "dime-fm-swin-t": Known("swin_tiny_patch4_window7_224", "store:weights/dime_fm_swint.pth",
                            "DIME-FM release, image_encoder.* and image_projection below 'model'", UNSTATED, "dime_fm",
                            "dime_fm/swin_forward_a", MEAN, "projected", {"num_classes": 768}),
    "udi-s": Known("vit_small_patch16_224", "store:weights/udi_vits16.pth",
                   "UDI release, key teacher or the backbone alone", "Apache-2.0", "udi", "udi/vit_wrapper_2cls",
                   args={"reg_tokens": 1, "no_embed_class": False}),
}  # fmt: skip

KNOWN = TEACHERS | STUDENTS


def fill(part: Part) -> Part:
    """A recipe's teacher or student that goes by a name of this table, with all it leaves at its default filled in."""
    values: Any = part
    known = KNOWN.get(values.name)
    if known is None:
        return part
    fresh, args = type(values)(), {**known.args, **values.args}
    if not hasattr(values, "cls"):
        args.pop("img_size", None)  # of a student, it is the stage's
    given = {"name": known.timm, "args": args}
    for key in ("weights", "licence", "cls"):
        if hasattr(values, key):
            own = getattr(values, key)
            given[key] = getattr(known, key) if own == getattr(fresh, key) else own
    filled: Part = dataclasses.replace(values, **given)
    return filled
