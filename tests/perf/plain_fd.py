"""Feature-Distillation's maths as the notes write it, to compare speed with: scores and biases spelt out, the projector
as a convolution between two transpositions, CLIP's statistics applied to every batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.beit import Attention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from core.data.colour import IMAGENET_MEAN, IMAGENET_STD
from core.data.pillow import CLIP_MEAN, CLIP_STD
from core.methods.base import Info
from core.methods.fd import FdModel, fd_loss, whiten
from core.models.fused import BiasedAttention, CosineAttention
from core.models.rel_pos import SharedBias, relative_index
from core.models.teachers import FrozenTeacher
from core.recipe import Teacher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGES, GRID, DIM, HEADS, BLOCKS = (128 if DEVICE.type == "cuda" else 2), (14, 14), 768, 12, 2
Pair = tuple[Callable[[], None], Callable[[], None]]


def pairs() -> dict[str, Pair]:
    torch.manual_seed(0)
    return {
        "attention with a shared bias": _shared(),
        "attention of SwinV2": _swin(),
        "projector, whitening and loss": _loss(),
        "patch embedding with CLIP's statistics": _embedding(),
    }


def explicit_attention(own: Attention, x: Tensor, bias_HNN: Tensor) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = own.qkv(x) + torch.cat([own.q_bias, torch.zeros_like(own.q_bias), own.v_bias])
    q, k, v = qkv.reshape(batch, tokens, 3, own.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * own.scale) @ k.transpose(-2, -1) + bias_HNN.unsqueeze(0)
    return own.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, dim))


def _shared() -> Pair:
    """Two blocks' attention, whose bias the product gathers once and the plain form in every block."""
    blocks = [Attention(DIM, HEADS, qkv_bias=True).to(DEVICE) for _ in range(BLOCKS)]
    fused = [BiasedAttention(block) for block in blocks]
    rows = (2 * GRID[0] - 1) * (2 * GRID[1] - 1) + 3
    shared = SharedBias(nn.Parameter(torch.randn(rows, HEADS, device=DEVICE)), GRID)
    index = relative_index(GRID).to(DEVICE)
    x = torch.randn(IMAGES, GRID[0] * GRID[1] + 1, DIM, device=DEVICE)

    def product() -> None:
        bias, y = shared(), x
        for block in fused:
            y = y + block(y, bias)
        y.sum().backward()

    def plain() -> None:
        y = x
        for block in blocks:
            bias = shared.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)
            y = y + explicit_attention(block, y, bias.contiguous())
        y.sum().backward()

    return product, plain


def _swin() -> Pair:
    windows, dim, heads = 4 * IMAGES, 256, 8
    own = WindowAttention(dim, GRID, heads).to(DEVICE)
    fused, x = CosineAttention(own), torch.randn(windows, GRID[0] * GRID[1], dim, device=DEVICE)
    return lambda: fused(x).sum().backward(), lambda: own(x).sum().backward()


def _loss() -> Pair:
    tokens = GRID[0] * GRID[1] + 1
    model = FdModel(nn.Identity(), DIM, [DIM], (0, 0)).to(DEVICE)
    linear = model.decoder[0]
    z = torch.randn(8 * IMAGES, tokens, DIM, device=DEVICE, requires_grad=True)
    teacher = torch.randn(8 * IMAGES, tokens, DIM, device=DEVICE)
    weight = linear.weight.detach().unsqueeze(-1).requires_grad_()

    def plain() -> None:
        s = F.conv1d(z.permute(0, 2, 1), weight, linear.bias).permute(0, 2, 1)
        mean, var = teacher.mean(-1, keepdim=True), teacher.var(-1, keepdim=True, unbiased=False)
        error = s - (teacher - mean) / (var + 1e-5).sqrt()
        torch.where(error.abs() < 2, error.square() / 4, error.abs() - 1).mean().backward()

    return lambda: fd_loss(linear(z), whiten(teacher)).backward(), plain


def _embedding() -> Pair:
    """A frozen teacher's first layer on 224 px, without gradient."""

    def network() -> nn.Module:
        model = nn.Module()
        model.patch_embed = nn.Module()
        model.patch_embed.proj = nn.Conv2d(3, DIM, 16, 16, bias=False, device="cpu")
        return model

    folded, bare = network(), network()
    bare.load_state_dict(folded.state_dict())
    info = Info("teacher", DIM, 0, 16, GRID, 1, has_cls=True, is_vit=False, img_size=224)
    FrozenTeacher(Teacher(name="vit_base_patch16_clip_quickgelu_224", weights="", normalize="own"), folded, info, info)
    folded.to(DEVICE), bare.to(DEVICE)
    x = torch.randn(8 * IMAGES, 3, 224, 224, device=DEVICE)
    given, own = ([torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in pair]
                  for pair in ((IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)))  # fmt: skip

    @torch.no_grad()
    def product() -> None:
        folded.patch_embed.proj(x)

    @torch.no_grad()
    def plain() -> None:
        bare.patch_embed.proj((x * given[1] + given[0] - own[0]) / own[1])

    return product, plain
