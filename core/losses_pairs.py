"""Losses on the cosine scores between two sets of vectors, such as all images and all sentences of a global batch.

Pure functions of tensors, in float32 or wider. Letters: B images, N sentences, D width. Scores reach +-100, where
rounding to bf16 shifts a loss by a tenth, so inputs are widened and products run without TF32 or autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 100.0  # of cosines, constant: CLIP's learnt scale at its bound


@dataclass(frozen=True)
class Weights:
    """Weights and temperatures of the three score losses (DIME-FM, arXiv 2303.18232; released defaults)."""

    vl: float = 0.7
    pvl: float = 0.3
    udist: float = 0.0
    t_vl: float = 1.0
    t_pvl: float = 3.0
    t_udist: float = 7.0


def unit(x_ND: Tensor) -> Tensor:
    """Rows divided by their norm, in float32 or wider; no epsilon."""
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    out: Tensor = x_ND / x_ND.norm(dim=-1, keepdim=True)
    return out


def cosine_scores(a_RD: Tensor, b_CD: Tensor, scale: float = SCALE) -> Tensor:
    """(R, D), (C, D) -> (R, C): scale times the cosine of every row with every row."""
    with full_precision(a_RD.device):
        return scale * unit(a_RD) @ unit(b_CD).T


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their inputs, whatever the caller runs in."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def score_divergence(teacher_RC: Tensor, student_RC: Tensor, temperature: float, dim: int = 1) -> Tensor:
    """Mean over rows (dim 1) or columns (dim 0) of KL(softmax(teacher / t) -> softmax(student / t)); no t^2.

    As sum p (z - q) + logsumexp q - logsumexp z for scores z, q over t: one exponential per matrix, and the teacher's
    distribution is all that backward keeps beside the student's scores.
    """
    z_RC, q_RC = teacher_RC / temperature, student_RC / temperature
    norm = z_RC.logsumexp(dim, keepdim=True)
    p_RC = (z_RC - norm).exp()
    cross = (p_RC * (z_RC - q_RC)).sum(dim) - norm.squeeze(dim)
    return (cross + q_RC.logsumexp(dim)).mean()


def score_losses(
    student_BD: Tensor,
    image_BD: Tensor,
    text_ND: Tensor,
    weights: Weights,
    use_pvl: bool = True,
    use_udist: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score distillation of the whole global batch: total and the terms vl, pvl, udist (zero when switched off).

    student_BD: the student's image vectors, the only ones with a gradient.  image_BD, text_ND: the teacher's vectors of
    the same images and of unrelated sentences.  Any norm: all are divided by it.

        vl    = KL(S(I_T, T) -> S(I_S, T)) over rows + the same over columns
        pvl   = 2 KL(S(I_T, I_T) -> S(I_S, I_T)): the teacher's images in the place of sentences
        udist = 2 KL(S(I_T, I_T) -> S(I_S, I_S))
        total = sum of weight x term; weights are not renormalised when a term is off

    Both directions of a pair share one product, so that there are four of B x B (five with udist).
    """
    with full_precision(student_BD.device):
        images_BD, texts_ND = unit(image_BD).detach(), unit(text_ND).detach()
        own_BD = unit(student_BD)
        teacher_BN = SCALE * images_BD @ texts_ND.T
        student_BN = SCALE * own_BD @ texts_ND.T
        vl = sum(score_divergence(teacher_BN, student_BN, weights.t_vl, dim) for dim in (1, 0))
        off = own_BD.new_zeros(())
        teacher_BB = SCALE * images_BD @ images_BD.T if use_pvl or use_udist else off
        pvl = 2 * score_divergence(teacher_BB, SCALE * own_BD @ images_BD.T, weights.t_pvl) if use_pvl else off
        udist = 2 * score_divergence(teacher_BB, SCALE * own_BD @ own_BD.T, weights.t_udist) if use_udist else off
    total = weights.vl * vl + weights.pvl * pvl + weights.udist * udist
    return total, {"vl": torch.as_tensor(vl), "pvl": pvl, "udist": udist}


def vector_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean over images of |u(I_S) - u(I_T)|^2, the optional vector-level term."""
    return (unit(student_BD) - unit(teacher_BD)).square().sum(-1).mean()
