from __future__ import annotations

import numpy as np
import pytest
import torch

from core.models.rel_pos import ALIGN, geometric_offsets, relative_bias, relative_index, resize_table


def test_equal_offsets_share_a_row_and_the_class_token_has_three_of_its_own() -> None:
    index = relative_index((2, 3))
    assert index.shape == (7, 7)
    assert index[0, 0] == 17
    assert index[0, 1:].unique().tolist() == [15]
    assert index[1:, 0].unique().tolist() == [16]
    assert index[1, 2] == index[4, 5], "one to the right, in both rows"
    assert index[2, 1] != index[1, 2]
    assert torch.equal(relative_index((2, 3), cls=False), index[1:, 1:])


def test_rows_of_a_bias_start_where_kernels_want_them_and_the_gradient_reaches_the_table() -> None:
    table = torch.randn(28, 2, requires_grad=True)
    bias = relative_bias(table, relative_index((3, 3)))
    assert bias.shape == (2, 10, 10)
    assert all(stride % ALIGN == 0 for stride in bias.stride()[:-1])
    assert bias.stride(-1) == 1
    bias.sum().backward()
    assert table.grad is not None
    counts = torch.bincount(relative_index((3, 3)).flatten(), minlength=28).float()
    torch.testing.assert_close(table.grad, counts[:, None].expand(28, 2))


def test_a_table_of_the_same_grid_is_left_alone_and_a_constant_one_stays_constant() -> None:
    table = torch.full((28, 2), 0.5)
    assert resize_table(table, (3, 3), (3, 3)) is table
    larger = resize_table(table, (3, 3), (5, 4))
    assert larger.shape == (9 * 7 + 3, 2)
    torch.testing.assert_close(larger, torch.full_like(larger, 0.5))


def test_near_offsets_keep_their_bias_and_far_ones_are_stretched() -> None:
    offsets = geometric_offsets(13, 15)
    steps = np.diff(offsets[13:])
    assert offsets[13] == 0
    assert offsets[-1] == pytest.approx(15, abs=1e-4)
    np.testing.assert_allclose(steps[1:] / steps[:-1], steps[1] / steps[0])
    table = torch.randn(27 * 27, 1, generator=torch.Generator().manual_seed(0))
    old, new = table.view(27, 27), resize_table(table, (14, 14), (16, 16)).view(31, 31)
    torch.testing.assert_close(new[15, 14:17], old[13, 12:15])
    assert (new[0, 0] - old[0, 0]).abs() < 1e-2
