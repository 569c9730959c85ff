"""Proteus as the formulas read: the masked pass and the heads over the whole batch, in passes of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from core.data.masks import mask_counts, place_masks, smallest
from core.methods.base import Batch
from core.methods.proteus import mask_tensors, proteus_loss
from core.models.adapters import MaskedStudent
from core.models.vit import embed_patches

DEPTH, DIM, OUT, BATCH, SIDE, PATCH = 4, 192, 384, 8, 112, 14
Calls = tuple[Callable[[], object], Callable[[], object]]


def plain_loss(model: MaskedStudent, images: Tensor, masks_BN: Tensor, cls_BD: Tensor, patch_BND: Tensor) -> Tensor:
    heads = model.heads["t"]
    seen, hidden = _pass(model, images, None), _pass(model, images, masks_BN)
    masked = heads["patch"](hidden[:, 1:])[masks_BN]  # type: ignore[index]
    token, feature = heads["token"](seen[:, 0]), heads["feature"](seen[:, 1:])  # type: ignore[index]
    whole = F.mse_loss(torch.cat([token[:, None], feature], 1), torch.cat([cls_BD[:, None], patch_BND], 1))
    return F.mse_loss(token, cls_BD) + whole + F.mse_loss(masked, patch_BND[masks_BN])


def _pass(model: MaskedStudent, images: Tensor, masks_BN: Tensor | None) -> Tensor:
    vit = model.student
    x, _ = embed_patches(vit, images)
    x = x if masks_BN is None else torch.where(masks_BN[..., None], model.mask_token, x)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def pairs() -> dict[str, Calls]:
    torch.manual_seed(0)
    vit = VisionTransformer(SIDE, PATCH, embed_dim=DIM, depth=DEPTH, num_heads=3, num_classes=0, init_values=1.0)
    model = MaskedStudent(vit, DIM, {"t": OUT}, ("token", "feature", "patch"))
    places = (SIDE // PATCH) ** 2
    drawn = np.random.default_rng(0).random((BATCH // 2, places))
    masks = place_masks(smallest(drawn, mask_counts(BATCH // 2, places, [0.5])), BATCH)
    images, masks_BN = torch.randn(BATCH, 3, SIDE, SIDE), torch.from_numpy(masks.masks)
    cls, patch = torch.randn(BATCH, OUT), torch.randn(BATCH, places, OUT)
    batch = Batch({"image": images}, extra=mask_tensors(masks, images.device))
    targets = {"t": {"token": cls, "feature": patch, "patch": patch[masks_BN]}}

    def product() -> None:
        proteus_loss(model(batch), targets, (1.0, 1.0, 1.0))[0].backward()

    def plain() -> None:
        plain_loss(model, images, masks_BN, cls, patch).backward()

    return {"student, heads and loss": (product, plain)}
