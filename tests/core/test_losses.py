from __future__ import annotations

import math

import pytest
import torch

from core.losses import cosine_distance, drop_teachers, smooth_l1
from tests.host_syncs import HostSyncs

torch.set_num_threads(1)


def test_cosine_distance_of_known_angles() -> None:
    east, north_east, west = torch.tensor([[1.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])
    got = cosine_distance(east.expand(3, 2), torch.stack([east, north_east, west]))
    assert torch.allclose(got, torch.tensor([0.0, 1 - math.sqrt(0.5), 2.0]))


def test_cosine_distance_to_a_zero_vector_is_one_with_finite_gradient() -> None:
    pred = torch.zeros(2, 4, requires_grad=True)
    got = cosine_distance(pred, torch.ones(2, 4))
    got.sum().backward()
    assert got.tolist() == [1.0, 1.0]
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("term", [cosine_distance, smooth_l1])
def test_terms_of_bfloat16_features_are_computed_in_float32(term) -> None:
    pred, target = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = term(pred, target)
    assert got.dtype == torch.float32
    assert torch.equal(got, term(pred.float(), target.float()))


def test_smooth_l1_is_quadratic_below_beta_linear_above_and_a_mean_over_channels() -> None:
    pred = torch.tensor([[0.5, 0.5], [3.0, 0.0], [2.0, -2.0]])
    assert torch.allclose(smooth_l1(pred, torch.zeros(3, 2)), torch.tensor([0.125, 1.25, 1.5]))
    assert torch.allclose(smooth_l1(pred, torch.zeros(3, 2), beta=2.0), torch.tensor([0.0625, 1.0, 1.0]))


def _by_loops(loss_TB: torch.Tensor, u_TB: torch.Tensor, p: float) -> tuple[float, list[list[bool]]]:
    draws_BT, keep_BT, kept = u_TB.T.tolist(), [], []
    for losses, draws in zip(loss_TB.T.tolist(), draws_BT, strict=True):
        worst = losses.index(max(losses))
        keep = [t == worst or not draw < p for t, draw in enumerate(draws)]
        kept += [loss for loss, is_kept in zip(losses, keep, strict=True) if is_kept]
        keep_BT.append(keep)
    return sum(kept) / len(kept), [list(row) for row in zip(*keep_BT, strict=True)]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_teachers_are_dropped_as_by_the_image_by_image_rule(p) -> None:
    generator = torch.Generator().manual_seed(3)
    loss_TB, u_TB = torch.rand(4, 29, generator=generator), torch.rand(4, 29, generator=generator)
    loss, keep_TB = drop_teachers(loss_TB, u_TB, p)
    want_loss, want_keep = _by_loops(loss_TB, u_TB, p)
    assert keep_TB.tolist() == want_keep
    assert loss.item() == pytest.approx(want_loss, rel=1e-6)


def test_the_first_of_equally_bad_teachers_is_the_one_always_kept() -> None:
    loss_TB = torch.tensor([[1.0, 2.0], [3.0, 2.0], [3.0, 2.0]])
    _, keep_TB = drop_teachers(loss_TB, torch.zeros(3, 2), 0.5)
    assert keep_TB.tolist() == [[False, True], [True, False], [False, False]]


def test_draws_of_teachers_kept_anyway_may_be_nan() -> None:
    loss_TB = torch.tensor([[5.0], [1.0]])
    loss, keep_TB = drop_teachers(loss_TB, torch.tensor([[float("nan")], [0.2]]), 0.5)
    assert keep_TB.tolist() == [[True], [False]]
    assert loss.item() == 5.0


def test_a_draw_equal_to_p_keeps_the_teacher() -> None:
    _, keep_TB = drop_teachers(torch.tensor([[5.0], [1.0]]), torch.full((2, 1), 0.5), 0.5)
    assert keep_TB.all()


def test_gradient_is_the_share_of_each_kept_pair_and_none_comes_through_the_coefficients() -> None:
    loss_TB = torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    u_TB = torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.9, 0.9]])
    loss, keep_TB = drop_teachers(loss_TB, u_TB, 0.5)
    loss.backward()
    assert loss_TB.grad is not None
    assert torch.allclose(loss_TB.grad, keep_TB.float() / 4)


def test_dropping_never_waits_for_the_device() -> None:
    loss_TB = torch.rand(4, 8, requires_grad=True)
    with HostSyncs() as syncs:
        loss, _ = drop_teachers(loss_TB, torch.rand(4, 8), 0.5)
        loss.backward()
    assert syncs.found == []
