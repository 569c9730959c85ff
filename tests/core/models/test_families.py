"""Every family of timm loads a file of its own names and shapes, whatever other layouts have in common with it."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch

from core.models.weights import fitted

torch.set_num_threads(1)

# One of each way to name parts: numbered stages, blocks in blocks, gammas, relative positions, towers, wrappers.
COVERING = (
    "beit_base_patch16_224", "beitv2_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convnext_atto",
    "crossvit_9_240", "davit_tiny", "deit_tiny_distilled_patch16_224", "edgenext_xx_small", "efficientformer_l1",
    "eva02_tiny_patch14_224", "fastvit_t8", "ghostnet_050", "iformer_h", "levit_128s", "mobilenetv4_conv_small_035",
    "mvitv2_tiny", "nest_tiny", "regnetx_002", "samvit_base_patch16", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2",
    "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip


@cache
def families() -> dict[str, str]:
    """The first model of each of timm's modules."""
    found: dict[str, str] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], name)
    return found


def check(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
        classes = timm.create_model(name, pretrained=False, num_classes=7)
    own = model.state_dict()
    assert fitted(model, own).keys() == own.keys()
    assert fitted(classes, {"state_dict": {f"module.{k}": v for k, v in classes.state_dict().items()}})


@pytest.mark.parametrize("name", COVERING)
def test_a_network_of_each_kind_of_naming_loads_its_own_state(name: str) -> None:
    check(name)


@pytest.mark.soak
@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_of_timm_loads_its_own_state(family: str) -> None:
    check(families()[family])
