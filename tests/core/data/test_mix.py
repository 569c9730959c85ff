from __future__ import annotations

import numpy as np
import pytest
import torch

from core.data.mix import DRAWS, Mix, beta, cut_box, draw_mix, mix_images, mix_labels, pasted_share


def draws(count: int = 400) -> np.ndarray:
    return np.random.default_rng(0).random((count, DRAWS))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_shares_have_the_mean_and_variance_of_their_distribution(alpha: float) -> None:
    found = np.array([beta(alpha, u[3:]) for u in draws(2000)])
    assert found.mean() == pytest.approx(0.5, abs=0.025)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_half_of_the_batches_are_pasted_and_none_where_one_kind_is_off() -> None:
    both = [draw_mix(u, (8, 8), 0.8, 1.0, 0.5) for u in draws()]
    assert 150 < sum(mix.box is not None for mix in both) < 250
    assert all(draw_mix(u, (8, 8), 0.8, 0.0, 0.5).box is None for u in draws(20))
    assert all(draw_mix(u, (8, 8), 0.0, 1.0, 0.5).box is not None for u in draws(20))
    assert draw_mix(draws(1)[0], (8, 8), 0.0, 0.0, 0.5) == Mix(1.0)


def test_a_box_cut_at_the_border_leaves_the_share_that_is_really_left() -> None:
    mix = cut_box(0.75, (8, 12), (0.0, 0.5))
    assert mix.box == (0, 2, 3, 9), "half of 8 by half of 12, around row 0 and column 6"
    assert mix.share == pasted_share((0, 2, 3, 9), (8, 12)) == 1 - 12 / 96


def test_images_mix_with_the_batch_in_reverse() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4).contiguous()
    torch.testing.assert_close(mix_images(x, Mix(0.75))[:, 0, 0, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]))
    pasted = mix_images(x, Mix(0.75, (0, 2, 0, 2)))
    assert pasted[0, 0].tolist() == [[3, 3, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2
    assert x[0].max() == 0, "the batch itself stays"


def test_labels_are_smoothed_before_they_are_mixed() -> None:
    soft = mix_labels(torch.tensor([0, 2]), 4, 0.75, 0.1)
    on, off = 0.925, 0.025
    wanted = torch.tensor([0.75 * on + 0.25 * off, off, 0.75 * off + 0.25 * on, off])
    torch.testing.assert_close(soft[0], wanted)
