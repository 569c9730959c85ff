"""DIME-FM's losses as the formulas read, one product per matrix and direction, for `make bench METHOD=dime_fm`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.losses_pairs import Weights, score_losses

BATCH, DIM, SCALE = 1024, 768, 100.0


def pairs() -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """name -> (product, plain): forward and backward on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    image, text, noise = (torch.randn(BATCH, DIM, generator=generator) for _ in range(3))
    student = (image + 0.5 * noise).requires_grad_()
    found = {}
    for name, weights in {"vl + pvl": Weights(), "vl + pvl + udist": Weights(0.68, 0.22, 0.10)}.items():
        found[f"loss, {name}, B {BATCH}"] = (
            lambda w=weights: _run(student, lambda: score_losses(student, image, text, w, True, w.udist > 0)[0]),
            lambda w=weights: _run(student, lambda: plain(student, image, text, w)),
        )
    return found


def _run(student: Tensor, loss: Callable[[], Tensor]) -> None:
    student.grad = None
    loss().backward()


def plain(student: Tensor, image: Tensor, text: Tensor, w: Weights) -> Tensor:
    vl = _divergence(_pair(image, text), _pair(student, text), w.t_vl)
    vl = vl + _divergence(_pair(text, image), _pair(text, student), w.t_vl)
    pvl = 2 * _divergence(_pair(image, image), _pair(student, image), w.t_pvl)
    total = w.vl * vl + w.pvl * pvl
    if w.udist > 0:
        total = total + w.udist * 2 * _divergence(_pair(image, image), _pair(student, student), w.t_udist)
    return total


def _pair(a: Tensor, b: Tensor) -> Tensor:
    return SCALE * (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, log_q = F.softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean")
