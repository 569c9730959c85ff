"""Upstream checkpoints, with all that lies beside the network in them, into timm: forward passes as recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.models.clip import as_projection, set_norm_eps
from core.models.features import last_tokens, take
from core.models.layouts import LAYOUTS
from core.models.weights import WeightsError, detect, load_strict, to_timm

torch.set_num_threads(1)

State = dict[str, Tensor]
GOLDEN = Path(__file__).parents[2] / "golden"


def case(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def params(arrays: Mapping[str, Any], prefix: str) -> State:
    return {k.removeprefix(prefix): torch.from_numpy(v).double() for k, v in arrays.items() if k.startswith(prefix)}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def junk(*keys: str) -> State:
    return {key: torch.ones(2) for key in keys}


def vit(size: int, patch: int, dim: int, depth: int, heads: int, **more: Any) -> nn.Module:
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, **{"num_classes": 0, **more}
    )


def clip(size: int, patch: int, dim: int, depth: int, heads: int, **more: Any) -> nn.Module:
    own = {"pre_norm": True, "act_layer": "quick_gelu", "num_classes": 0, **more}
    return set_norm_eps(vit(size, patch, dim, depth, heads, **own), 1e-5)


def swin(kind: type[nn.Module], size: int, dim: int, heads: tuple[int, ...], **more: Any) -> nn.Module:
    own = {"img_size": size, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_classes": 0, **more}
    return kind(embed_dim=dim, num_heads=heads, **own)


def beit() -> nn.Module:
    model = Beit(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, use_fc_norm=False,
    )  # fmt: skip
    return set_norm_eps(model, 1e-6)


def drawn(arrays: Mapping[str, Any], keys: str, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Parameters by the recipe in the README of the DIME-FM cases."""
    out = {}
    for i, key in enumerate(map(str, arrays[keys])):
        shape = shapes[key]
        z = np.random.RandomState(int(arrays["seed"]) + i).standard_normal(shape)
        if len(shape) == 1:
            z = 0.1 * z + key.endswith("weight")
        elif key.endswith("relative_position_bias_table"):
            z = 0.5 * z
        elif key.endswith("positional_embedding"):
            z = 0.3 * z
        else:
            z = z / np.sqrt(shape[0] if key.endswith(("proj", "projection")) else np.prod(shape[1:]))
        out[key] = torch.from_numpy(z)
    return out


def clip_shapes(model: nn.Module, tower: str, projection: str) -> dict[str, tuple[int, ...]]:
    """Upstream's shapes, from those of timm's network."""
    upstream = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj.": "conv1.",
        "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2.",
        "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }  # fmt: skip
    out: dict[str, tuple[int, ...]] = {}
    for key, value in model.state_dict().items():
        name, shape = key, tuple(value.shape)
        for ours, theirs in upstream.items():
            name = name.replace(ours, theirs)
        name = "ln_post." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if name == "class_embedding":
            shape = shape[2:]
        elif name == "positional_embedding":
            shape = shape[1:]
        if name == "head.weight":
            out[projection] = shape[::-1]
        elif name != "head.bias":
            out[tower + name] = shape
    return out


# Every entry: layout, checkpoint, network in float64, images, {name: (what to compare, recorded)}, tolerance.
Built = tuple[str, Any, nn.Module, Tensor, Callable[[nn.Module, Tensor], dict[str, Tensor]], dict[str, Any], float]
BUILD: dict[str, Callable[[], Built]] = {}


def built(function: Callable[[], Built]) -> Callable[[], Built]:
    BUILD[function.__name__] = function
    return function


def tokens(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    cls, patch = take(model, x, "token")
    return {"cls": cls, "patch": patch}


def class_token(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"cls": take(model, x, "token")[0]}


def unnormed_patches(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"cls": take(model, x, "token")[0], "patch": take(model, x, "token", norm=False)[1]}


def raw_and_normed(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    cls, patch = take(model, x, "token")
    return {"raw": last_tokens(model, x), "post": torch.cat([cls.unsqueeze(1), patch], 1)}


def projected(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    pooled = "token" if isinstance(model, VisionTransformer) else "pooled"
    return {"pre": take(model, x, pooled)[0], "out": take(model, x, "projected")[0], "timm": model(x)}


def two_class_tokens(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"cls": model.norm(last_tokens(model, x))[:, :2]}


def grid(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"post": take(model, x, "pooled")[1]}


def raw_grid(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return grid(model, x) | {"raw": last_tokens(model, x).flatten(1, 2)}


def images(arrays: Mapping[str, Any], key: str) -> Tensor:
    return torch.from_numpy(arrays[key]).double()


TEXT = ("transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "positional_embedding", "ln_final.weight",
        "text_projection", "logit_scale", "input_resolution", "context_length", "vocab_size")  # fmt: skip


@built
def openai_clip_with_its_text_tower() -> Built:
    a = case("fd/clip_teacher_fwd")
    state = prefixed("visual.", params(a, "param/")) | junk(*TEXT)
    shift = torch.tensor((0.48145466, 0.4578275, 0.40821073)).double().view(1, 3, 1, 1)
    scale = torch.tensor((0.26862954, 0.26130258, 0.27577711)).double().view(1, 3, 1, 1)
    mean = torch.tensor((0.485, 0.456, 0.406)).double().view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).double().view(1, 3, 1, 1)
    x = (images(a, "x") * std + mean - shift) / scale
    want = {"raw": a["raw"], "post": a["post"]}
    return "clip", state, clip(24, 8, 20, 2, 4), x, raw_and_normed, want, 5e-6


@built
def clip_without_prefix_and_projection() -> Built:
    a = case("proteus/backbone_clip")
    want = {"cls": a["cls"], "patch": a["patch_tokens"]}
    return "clip", params(a, "p/"), clip(16, 4, 18, 2, 3), images(a, "x"), unnormed_patches, want, 5e-6


@built
def clip_with_projection() -> Built:
    a = case("dime_fm/vit_forward_a")
    model = as_projection(clip(32, 8, 128, 3, 2, num_classes=24))
    state = {
        "state_dict": prefixed("module.", drawn(a, "sorted_param_keys", clip_shapes(model, "visual.", "visual.proj")))
    }
    want = {"pre": a["pre_projection"], "out": a["output"], "timm": a["output"]}
    return "clip", state, model, images(a, "images"), projected, want, 1e-9


@built
def dinov2_giant() -> Built:
    a = case("proteus/backbone_dinov2_giant")
    from timm.layers import SwiGLUPacked

    model = vit(16, 4, 18, 2, 3, init_values=1.0, mlp_ratio=96 / 18, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    want = {"cls": a["cls"], "patch": a["patch_tokens"]}
    return "dinov2", params(a, "p/"), model, images(a, "x"), tokens, want, 2e-6


@built
def dinov2_with_a_larger_table_below_a_linear_head() -> Built:
    a = case("proteus/backbone_dinov2")
    state = prefixed("backbone.", params(a, "p/")) | junk("linear_head.weight")
    want = {"cls": a["cls"], "patch": a["patch_tokens"]}
    return "dino", state, vit(24, 4, 16, 5, 2, init_values=1.0), images(a, "x"), tokens, want, 2e-6


@built
def synclr_with_its_heads() -> Built:
    a = case("proteus/backbone_synclr")
    state = prefixed("module.", prefixed("visual.", params(a, "p/")) | junk("head.0.weight"))
    want = {"cls": a["cls"], "patch": a["patch_tokens"]}
    return "synclr", {"model": state, "epoch": 3}, vit(16, 4, 18, 2, 3), images(a, "x"), tokens, want, 1e-9


@built
def proteus_student_beside_teacher_and_heads() -> Built:
    a = case("proteus/loss_dinov2")
    state = {"model": params(a, "p/"), "model_ema": {}, "epoch": 7}
    model = vit(16, 4, 16, 2, 2, init_values=1.0)
    want = {"cls": a["o/student_cls"], "patch": a["o/student_patch"]}
    return "proteus", state, model, images(a, "images"), tokens, want, 2e-6


@built
def proteus_clip_student() -> Built:
    a = case("proteus/loss_clip")
    want = {"cls": a["o/student_cls"]}
    return "proteus", params(a, "p/"), clip(16, 4, 12, 2, 2), images(a, "images"), class_token, want, 5e-6


@built
def unic_student_with_its_ladder() -> Built:
    a = case("unic/student_encoder")
    state = prefixed("encoder.", params(a, "param.")) | junk("lp.heads.t.cls.0.layers.0.weight")
    want = {"cls": a["out.x_norm_cls.0"]}
    return (
        "unic",
        {"model": prefixed("module.", state)},
        vit(16, 4, 24, 3, 3),
        images(a, "in.image.0"),
        class_token,
        want,
        1e-9,
    )


@built
def esvit_student_beside_its_teacher() -> Built:
    a = case("fd/swin_teacher_fwd")
    own = params(a, "param/")
    buffers = junk("layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index")
    heads = junk("head.mlp.0.weight", "head_dense.last_layer.weight_g")
    state = {
        "student": prefixed("module.", own | buffers | heads),
        "teacher": {key: torch.zeros_like(value) for key, value in (own | buffers | heads).items()},
    }
    want = {"post": a["post"], "raw": a["raw"]}
    return "esvit", state, swin(SwinTransformer, 32, 6, (2, 3)), images(a, "x"), raw_grid, want, 1e-11


@built
def swin_as_published() -> Built:
    a = case("fd/swin_teacher_fwd")
    state = {"model": params(a, "param/") | junk("head.weight", "head.bias")}
    return "swin", state, swin(SwinTransformer, 32, 6, (2, 3)), images(a, "x"), grid, {"post": a["post"]}, 1e-11


@built
def fd_swinv2_student_beside_its_teacher() -> Built:
    a = case("fd/swinv2_student_fwd")
    buffers = junk("layers.0.blocks.1.attn_mask", "layers.1.blocks.0.attn.relative_coords_table")
    beside = junk("decoder.0.weight", "feature_model.cls_token")
    state = {"model": prefixed("encoder.", params(a, "param/") | buffers) | beside, "max_accuracy": 0.0}
    model = swin(SwinTransformerV2, 32, 6, (2, 3))
    return "fd", state, model, images(a, "x"), grid, {"post": a["z"]}, 5e-5


@built
def fd_vit_student_beside_its_teacher() -> Built:
    a = case("fd/vit_student_fwd")
    beside = junk("decoder.0.weight", "decoder.0.bias", "feature_model.cls_token")
    state = prefixed("encoder.", params(a, "param/") | junk("rel_pos_bias.relative_position_index")) | beside
    want = {"cls": a["z"][:, 0], "patch": a["z"][:, 1:]}
    return "fd", {"model": state}, beit(), images(a, "x"), tokens, want, 1e-11


@built
def beit_as_such() -> Built:
    a = case("fd/vit_student_fwd")
    want = {"cls": a["z"][:, 0], "patch": a["z"][:, 1:]}
    return "beit", params(a, "param/"), beit(), images(a, "x"), tokens, want, 1e-11


@built
def dime_fm_vit_as_released() -> Built:
    a = case("dime_fm/released_layout_a")
    model = set_norm_eps(as_projection(clip(32, 8, 64, 2, 2, num_classes=14)), 1e-12)
    state = drawn(a, "param_keys_sorted", clip_shapes(model, "visual.", "vision_projection"))
    for key in ("conv1.weight", "class_embedding", "positional_embedding"):
        state[f"visual.{key}"] *= float(a["shrink_conv_cls_pos"])
    renamed = {k.replace("visual.", "image_encoder.").replace("vision_", "image_"): v.float() for k, v in state.items()}
    assert sorted(renamed) == sorted(map(str, a["saved_keys"]))
    file = {"model": renamed | junk("lang_encoder.x", "lang_projection", "logit_scale")}
    return "dime_fm", file, model, images(a, "images"), projected, {"out": a["features"]}, 2e-4


@built
def dime_fm_swin() -> Built:
    a = case("dime_fm/swin_forward_a")
    model = as_projection(swin(SwinTransformer, 64, 16, (2, 4), num_classes=20))
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = {f"image_encoder.{key.replace('layers.1.downsample', 'layers.0.downsample')}": v for key, v in own.items()}
    state = drawn(a, "sorted_param_keys", shapes | {"image_projection": (32, 20)})
    want = {"pre": a["pooled"], "out": a["output"]}
    return "dime_fm", state, model, images(a, "images"), projected, want, 1e-9


@built
def udi_training_checkpoint() -> Built:
    a = case("udi/vit_wrapper_2cls")
    own = prefixed("backbone.", params(a, "param/")) | junk("head.0.mlp.0.weight", "head.2.last_layer.weight_g")
    file = {
        "student": prefixed("module.", {k: torch.zeros_like(v) for k, v in own.items()}),
        "teacher": own,
        "epoch": 5,
    }
    model, want = vit(32, 8, 24, 2, 3, reg_tokens=1), {"cls": a["cls_global"]}
    return "udi", file, model, images(a, "img_global"), two_class_tokens, want, 1e-8


@built
def udi_backbone_alone() -> Built:
    a = case("udi/vit_wrapper_2cls")
    own = {k.removeprefix("backbone."): v for k, v in params(a, "param/").items() if k.startswith("backbone.")}
    return (
        "udi",
        own,
        vit(32, 8, 24, 2, 3, reg_tokens=1),
        images(a, "img_local"),
        two_class_tokens,
        {"cls": a["cls_local"]},
        1e-7,
    )


@pytest.mark.parametrize("name", BUILD)
def test_an_upstream_checkpoint_gives_the_recorded_features(name: str) -> None:
    layout, checkpoint, model, x, forward, want, tolerance = BUILD[name]()
    assert detect(checkpoint) == layout
    model = model.double().eval()
    load_strict(model, checkpoint)
    with torch.no_grad():
        got = forward(model, x)
    for key, value in want.items():
        error = np.abs(got[key].numpy() - value).max() / max(1.0, np.abs(value).max())
        assert error <= tolerance, (key, error)


@pytest.mark.parametrize("name", BUILD)
def test_a_key_that_nobody_knows_is_refused_by_its_name(name: str) -> None:
    _, checkpoint, model, *_ = BUILD[name]()
    inner = checkpoint
    for key in ("student", "state_dict", "model"):
        inner = inner[key] if isinstance(inner.get(key), dict) else inner
    if name == "udi_training_checkpoint":
        inner = checkpoint["teacher"]
    wrapper = "module." if all(key.startswith("module.") for key in inner) else ""
    inner[f"{wrapper}surplus.weight"] = torch.ones(1)
    if name == "synclr_with_its_heads":
        load_strict(model, checkpoint)  # the documents do not name its heads: all beside the tower is left out
        return
    with pytest.raises(WeightsError, match=r"surplus\.weight"):
        load_strict(model, checkpoint)


def test_every_layout_is_proved_here_or_among_the_plain_ones() -> None:
    plain = {"timm", "dino", "ibot", "deit3", "dbot_ft", "dinov2", "unic"}  # test_weights.py
    assert plain | {BUILD[name]()[0] for name in BUILD} == set(LAYOUTS)


def test_parts_of_a_state_convert_as_the_whole_does() -> None:
    state = {"visual.class_embedding": torch.arange(4.0), "visual.proj": torch.ones(4, 3)}
    got = to_timm(state, "clip")
    assert {key: tuple(value.shape) for key, value in got.items()} == {"cls_token": (1, 1, 4), "head.weight": (3, 4)}
    assert to_timm({"layers.1.downsample.norm.weight": torch.ones(1)}, "swin").keys() == {
        "layers.2.downsample.norm.weight"
    }
    assert to_timm({"backbone.backbone.cls_token": torch.ones(1, 2, 4)}, "udi").keys() == {"cls_token", "reg_token"}


@pytest.mark.parametrize(("rows", "tokens"), [(198, 2), (197, 1), (196, 0)])
def test_udi_files_keep_the_class_tokens_and_positions_that_they_have(rows: int, tokens: int) -> None:
    state = {"pos_embed": torch.ones(1, rows, 4)} | ({"cls_token": torch.ones(1, tokens, 4)} if tokens else {})
    got = to_timm(state, "udi")
    assert got["pos_embed"].shape[1] == rows
    assert ("reg_token" in got, "cls_token" in got) == (tokens == 2, tokens > 0)


def test_two_keys_that_become_one_are_refused() -> None:
    state = {"blocks.0.1.norm1.weight": torch.ones(1), "blocks.1.1.norm1.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"two keys of the file become blocks\.1\.norm1\.weight"):
        to_timm(state, "dinov2")


def test_a_bias_of_zeros_beside_a_projection_may_be_missing_and_no_other() -> None:
    model = as_projection(clip(16, 8, 12, 1, 2, num_classes=5))
    state = {key: value for key, value in model.state_dict().items() if key != "head.bias"}
    load_strict(model, state)
    assert not model.state_dict()["head.bias"].any()
    with pytest.raises(WeightsError, match="missing: head.bias"):
        load_strict(clip(16, 8, 12, 1, 2, num_classes=5), state)
