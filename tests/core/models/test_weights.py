from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from core.models.weights import WeightsError, detect, fitted, load_strict, read, to_timm

torch.set_num_threads(1)

State = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny(seed: int = 0, **settings: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5} | settings
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: State, per_chunk: int = 1) -> State:
    """blocks.{i} -> blocks.{chunk}.{i}, as DINOv2 numbers them."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        chunk = [str(int(parts[1]) // per_chunk)] if parts[0] == "blocks" else []
        out[".".join([parts[0], *chunk, *parts[1:]])] = value
    return out


def without_head(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def released_unic(state: State) -> State:
    encoder = chunked(without_head(state), per_chunk=99) | {"mask_token": torch.zeros(1, 24)}
    ladder = {"lp.heads.t.cls.0.layers.0.weight": torch.ones(2, 2)}
    return prefixed("module.", prefixed("encoder.", encoder) | ladder)


PLAIN: dict[str, Any] = {}
SCALED = {"no_embed_class": True, "init_values": 0.1}
AVERAGED = {"global_pool": "avg"}
# layout -> (settings of the model, upstream checkpoint from its timm state)
UPSTREAM: dict[str, tuple[dict[str, Any], Any]] = {
    "timm": (PLAIN, lambda s: s),
    "dino": (PLAIN, lambda s: {"teacher": prefixed("backbone.", without_head(s)) | {"head.mlp.weight": torch.ones(3)}}),
    "deit3": (
        SCALED,
        lambda s: {
            "model": {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in s.items()}
        },
    ),
    "dbot_ft": (AVERAGED, lambda s: {"model": s}),
    "unic": (PLAIN, lambda s: {"model": released_unic(s), "epoch": 3, "optimizer": {"state": {}}}),
    "dinov2": (PLAIN | {"init_values": 0.1}, lambda s: chunked(without_head(s)) | {"mask_token": torch.zeros(1, 24)}),
}


@pytest.mark.parametrize("layout", UPSTREAM)
def test_upstream_checkpoints_are_recognised_and_give_the_same_features(layout) -> None:
    settings, upstream = UPSTREAM[layout]
    source = tiny(seed=1, **settings)
    checkpoint = upstream(source.state_dict())
    assert detect(checkpoint) == layout
    model = tiny(seed=2, num_classes=0, **settings)
    load_strict(model, checkpoint)
    assert torch.equal(model(IMAGES), source.forward_head(source.forward_features(IMAGES), pre_logits=True))


@pytest.mark.parametrize("layout", ["dino", "ibot"])
@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"state_dict": s}, lambda s: prefixed("module.", s)])
def test_bare_dino_and_ibot_weights_are_timm_s_already(layout, nest) -> None:
    state = tiny(num_classes=0).state_dict()
    assert {k: id(v) for k, v in to_timm(nest(state), layout).items()} == {k: id(v) for k, v in state.items()}


def test_dinov2_with_registers_and_swiglu_converts_as_in_timm() -> None:
    model = timm.create_model(
        "vit_giant_patch14_reg4_dinov2", img_size=28, embed_dim=24, depth=2, num_heads=3, pretrained=False
    ).eval()
    own = model.state_dict()
    upstream = {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): torch.randn_like(value)
        for key, value in own.items()
        if key not in ("reg_token", "pos_embed")
    }
    upstream |= {"register_tokens": torch.randn(1, 4, 24), "mask_token": torch.zeros(1, 24)}
    upstream |= {"pos_embed": torch.randn(1, 5, 24)}
    want = checkpoint_filter_fn(dict(upstream), model)
    got = to_timm(chunked(upstream))
    assert got.keys() == own.keys()
    assert all(torch.equal(got[key], want[key].reshape(got[key].shape)) for key in own)


def test_a_dinov2_training_checkpoint_is_unwrapped_twice() -> None:
    state = without_head(tiny().state_dict())
    backbone = chunked(state) | {"mask_token": torch.zeros(1, 24)}
    checkpoint = {"teacher": prefixed("backbone.", backbone) | {"dino_head.last_layer.weight": torch.ones(2)}}
    assert to_timm(checkpoint).keys() == state.keys()


def test_the_teacher_of_a_training_checkpoint_is_preferred_to_its_student() -> None:
    student, teacher = tiny(seed=1).state_dict(), tiny(seed=2).state_dict()
    got = to_timm({"student": student, "teacher": teacher, "epoch": 3})
    assert torch.equal(got["cls_token"], teacher["cls_token"])


def test_all_misfits_are_listed_and_the_model_stays_as_it_was() -> None:
    model = tiny(num_classes=0)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    del state["norm.weight"], state["cls_token"]
    state |= {"extra.weight": torch.ones(1), "pos_embed": torch.ones(1, 5, 24)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_strict(model, state)
    assert str(caught.value).splitlines() == [
        "weights (read as layout timm) do not fit VisionTransformer",
        "  missing: cls_token, norm.weight",
        "  unexpected: extra.weight",
        "  pos_embed: file (1, 5, 24), model (1, 17, 24)",
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_classifier_is_left_out_only_by_a_model_without_one() -> None:
    state = tiny(seed=1).state_dict()
    load_strict(tiny(num_classes=0), state)
    with pytest.raises(WeightsError, match=r"head.bias: file \(5,\), model \(7,\)"):
        load_strict(tiny(num_classes=7), state)
    with pytest.raises(WeightsError, match=r"missing: head.bias, head.weight"):
        load_strict(tiny(num_classes=5), without_head(state))


def test_classifiers_under_other_names_and_other_networks_load_as_well() -> None:
    source, model = timm.create_model("resnet10t", num_classes=3), timm.create_model("resnet10t", num_classes=0)
    load_strict(model, source.state_dict())
    assert torch.equal(model.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="unknown layout 'dino3'; known are proteus, fd,"):
        to_timm(tiny().state_dict(), "dino3")


def test_a_checkpoint_without_weights_is_refused_with_its_keys() -> None:
    with pytest.raises(WeightsError, match="the keys are: epoch, optimizer"):
        detect({"epoch": 3, "optimizer": {}})


def test_safetensors_and_torch_archives_read_the_same(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        got = read(tmp_path / name)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], state[key]) for key in state)


@pytest.mark.parametrize("written_by_numpy", [1, 2])
def test_arguments_beside_the_weights_are_read_without_running_anything(tmp_path: Path, written_by_numpy) -> None:
    arguments = argparse.Namespace(
        lr_schedule=np.linspace(0, 1, 5), lr=np.float64(0.25), name="unic", flag=np.bool_(True)
    )
    path = tmp_path / "unic.pth"
    torch.save({"model": {"w": torch.ones(2)}, "args": arguments}, path, _use_new_zipfile_serialization=False)
    if written_by_numpy == 1:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    got = read(path)
    assert got["args"].lr_schedule.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (got["args"].lr, got["args"].name, bool(got["args"].flag)) == (0.25, "unic", True)
    assert to_timm(got).keys() == {"w"}


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_archive_that_needs_objects_is_refused_without_running_them(tmp_path: Path) -> None:
    torch.save({"model": Harmful(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth: needs an object posix.mkdir,.* convert it once .*safetensors"):
        read(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x07" * 400])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name, damage) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save({"w": torch.ones(500)}, path)
    else:
        save_file({"w": torch.ones(500)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=rf"{name}: damaged, or neither"):
        read(path)


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"model": Harmful(tmp_path / "ran")}))
    with pytest.raises(WeightsError):
        read(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_a_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weight file"):
        read(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list, not a dictionary"):
        read(tmp_path / "list.pth")


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 2, bias=False).half()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        self.proj = torch.nn.Parameter(torch.randn(4, 3).T)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_archive_is_read_as_its_state_and_none_of_its_code_runs(tmp_path: Path) -> None:
    module = Tower()
    torch.jit.script(module).save(tmp_path / "ViT.pt")
    got, want = read(tmp_path / "ViT.pt"), module.state_dict()
    assert got.keys() == want.keys()
    assert all(got[key].dtype is want[key].dtype and torch.equal(got[key], want[key]) for key in want)


def test_a_torchscript_archive_that_needs_objects_is_refused_without_running_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"w": Harmful(tmp_path / "ran")}))
        archive.writestr("bad/constants.pkl", b"")
    with pytest.raises(WeightsError, match=r"bad\.pt: needs an object posix.mkdir"):
        read(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


# Networks of which at f7ec1b9 no file with their own names could be read: blocks.N.M. was taken for DINOv2's chunks.
OWN_NAMES = ("lcnet_050", "efficientnet_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mnasnet_050",
             "ghostnet_050", "cait_xxs24_224", "tinynet_e", "resnet10t", "convnext_atto", "hiera_tiny_224")  # fmt: skip


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_file_with_a_network_s_own_names_is_read_as_such(name: str) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=0)
    state = {key: torch.full_like(value, 2) for key, value in model.state_dict().items()}
    load_strict(model, state)
    assert all(value.eq(2).all() for value in model.state_dict().values())
    classes = timm.create_model(name, pretrained=False, num_classes=7).state_dict()
    load_strict(model, {"state_dict": {f"module.{key}": value for key, value in classes.items()}})


# ---- wrappings


def inside(wrapper: str) -> Any:
    """A name of a module around each block's own."""
    return lambda s: {re.sub(r"^(blocks\.\d+)\.", rf"\1.{wrapper}.", key): value for key, value in s.items()}


WRAPPED: dict[str, Any] = {
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s, "loss": torch.tensor(1.5)},
    "module": lambda s: {"module": s, "ds_version": "0.1"},
    "compiled blocks": inside("_orig_mod"),
    "checkpointed blocks": inside("_checkpoint_wrapped_module"),
    "blocks of data parallelism": inside("module"),
    "sharded": lambda s: prefixed("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module")(s)),
    "compiled and parallel": lambda s: prefixed("module._orig_mod.", s),
    "parallel and compiled": lambda s: prefixed("_orig_mod.module.", s),
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **prefixed("module.", s)},
    "two names of containers": lambda s: {"teacher": {"name": "dinov2"}, "model": s},
    "dino in data parallelism": lambda s: {"teacher": prefixed("backbone.module.", s) | {"head.w": torch.ones(1)}},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_training_puts_around_weights_is_taken_off(wrapping: str) -> None:
    state = tiny(seed=1, num_classes=0).state_dict()
    model = tiny(seed=2, num_classes=0)
    load_strict(model, WRAPPED[wrapping](state))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_two_keys_that_become_one_are_refused() -> None:
    with pytest.raises(WeightsError, match="two keys of the file become a, one of them _orig_mod.a"):
        to_timm({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)})


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: prefixed("model.", s), "30 of the network's 30 names lie below 'model.': save what is below"),
        (lambda s: prefixed("backbone.", s) | {"projection_head.w": torch.ones(1)}, "not known: projection_head.w\n"),
        (lambda s: prefixed("a.", s) | prefixed("b.", s), "names lie below 'a.'"),
        (lambda s: {f"net.layer{i}": value for i, value in enumerate(s.values())}, "all its keys begin with 'net.'"),
        (lambda s: {k: v[..., None] for k, v in s.items()}, "and 20 more of other shapes"),
        (lambda s: {"x" * 9000 + "\x1b[31m": torch.ones(1)}, r"unexpected: 'x+\.\.\."),
    ],
)
def test_a_misfit_is_told_in_one_short_message_with_ten_keys_at_most(wrap: Any, said: str) -> None:
    own = tiny(num_classes=0).state_dict()
    state = wrap(dict(own))
    with pytest.raises(WeightsError, match=said) as caught:
        load_strict(tiny(num_classes=0), state)
    text = str(caught.value)
    assert text.startswith("weights (read as layout ")
    assert len(text) < 1500
    assert "\x1b" not in text
    assert sum(word.rstrip(".") in own.keys() | state.keys() for word in re.findall(r"[\w.]+", text)) <= 10


def test_the_layout_that_comes_nearest_is_named() -> None:
    state = chunked(without_head(tiny().state_dict())) | {"mask_token": torch.zeros(1, 24), "more": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"read as layout dinov2\) do not fit \w+\n  unexpected: more$"):
        load_strict(tiny(num_classes=0), state)


@pytest.mark.parametrize("beside", [{}, {"cls_token": torch.ones(3), "pos_embed": torch.ones(())}])
def test_marks_of_a_layout_without_the_rest_are_no_bug(beside: State) -> None:
    with pytest.raises(WeightsError, match="look like layout dinov2 and are not"):
        load_strict(tiny(num_classes=0), {"register_tokens": torch.ones(1, 4, 24), **beside})


def test_keys_of_a_file_without_tensors_are_few_and_told_what_they_are() -> None:
    with pytest.raises(WeightsError, match=r"k9 and 490 more \(of ndarray: only torch's tensors are read\)"):
        detect({f"k{i}": np.ones(2) for i in range(500)})


def test_a_fit_is_told_from_shapes_alone() -> None:
    with torch.device("meta"):
        model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0)
        state = chunked(without_head(model.state_dict()))
    assert fitted(model, state).keys() == model.state_dict().keys()
    with pytest.raises(WeightsError, match=r"pos_embed: file \(1, 10, 24\), model \(1, 17, 24\)"):
        fitted(model, state | {"pos_embed": torch.empty(1, 10, 24, device="meta")})
    assert fitted(model, state | {"pos_embed": torch.empty(1, 10, 24, device="meta")}, fit_positions=True)
