"""Codecs: what comes back of teacher outputs, and what that costs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.features.codec import CODECS, PLAIN, SCALED, FeatureError, check_finite, decode, encode, layout, row_bytes


def tokens(rows: int = 64, count: int = 16, width: int = 96) -> Tensor:
    """Like those of vision transformers: heavy tails, a few channels far larger than the rest, norms that differ."""
    draws = torch.Generator().manual_seed(0)
    normal, chi = torch.randn(rows, count, width, generator=draws), torch.randn(3, rows, count, width, generator=draws)
    heavy = normal / (chi.square().mean(0) + 1e-3).sqrt()
    heavy[..., ::37] *= 20
    return heavy * torch.logspace(-2, 2, rows).view(-1, 1, 1)


def back(codec: str, values: Tensor) -> Tensor:
    return decode("patch", encode(codec, "patch", values))


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_stored_has_the_layout_that_was_announced(codec: str) -> None:
    stored = encode(codec, "patch", tokens(3))
    announced = layout(codec, {"patch": [16, 96]})
    assert {name: (value.dtype, tuple(value.shape[1:])) for name, value in stored.items()} == announced
    assert row_bytes(codec, {"patch": [16, 96]}) == sum(value[0].nbytes for value in stored.values())


@pytest.mark.parametrize("codec", PLAIN)
def test_numbers_of_a_plain_codec_come_back_bit_for_bit(codec: str) -> None:
    values = tokens().to(PLAIN[codec])
    assert torch.equal(back(codec, values), values.float())


@pytest.mark.parametrize(("codec", "least", "mean"), [("fp8", 0.9995, 0.9998), ("int8", 0.9995, 0.9998)])
def test_eight_bits_cost_little_in_the_direction_of_a_token(codec: str, least: float, mean: float) -> None:
    values = tokens()
    cosine = F.cosine_similarity(back(codec, values), values, dim=-1)
    assert cosine.min() > least
    assert cosine.mean() > mean


@pytest.mark.parametrize("codec", SCALED)
def test_a_large_token_takes_no_precision_from_a_small_one(codec: str) -> None:
    small, both = tokens(1), tokens(1).clone()
    both[:, 1:] *= 1e6
    assert torch.equal(back(codec, both)[:, 0], back(codec, small)[:, 0])


@pytest.mark.parametrize("codec", SCALED)
def test_the_largest_number_of_a_token_is_kept_and_a_token_of_nothing_stays_one(codec: str) -> None:
    values = tokens(2)
    values[0, 3] = 0
    found = back(codec, values)
    assert torch.allclose(found.abs().amax(-1), values.abs().amax(-1), rtol=1e-6)
    assert not found[0, 3].any()


def test_int8_is_wrong_by_half_a_step_at_most() -> None:
    values = tokens()
    step = values.abs().amax(-1, keepdim=True) / 127
    assert ((back("int8", values) - values).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("codec", ["fp16", "fp8", "bf16"])
@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_what_is_no_number_is_refused(codec: str, number: float) -> None:
    values = tokens(2)
    values[1, 2, 3] = number
    with pytest.raises(FeatureError, match="teacher one: .* holds infinities or NaN"):
        check_finite("teacher one", codec, encode(codec, "patch", values))


def test_int8_refuses_what_is_no_number() -> None:
    values = tokens(2)
    values[1, 2, 3] = math.nan
    with pytest.raises(FeatureError, match=r"patch\.scale holds infinities or NaN as int8"):
        check_finite("teacher one", "int8", encode("int8", "patch", values))


def test_numbers_too_large_for_half_precision_are_refused_with_what_holds_them() -> None:
    values = torch.full((1, 4), 1e5)
    with pytest.raises(FeatureError, match=r"data\.codec=bf16"):
        check_finite("teacher one", "fp16", encode("fp16", "cls", values))
    check_finite("teacher one", "bf16", encode("bf16", "cls", values))
