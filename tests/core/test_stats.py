from __future__ import annotations

import pytest
import torch

from core.stats import STD_FLOOR, RunningStats, merge_moments, moments, standardise
from tests.host_syncs import HostSyncs

torch.set_num_threads(1)


def _features(*shape: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + offset


def test_moments_are_mean_and_summed_squared_deviation_over_leading_axes() -> None:
    z = _features(4, 7, 5)
    flat = z.reshape(28, 5).double()
    want = torch.stack([flat.mean(0), (flat - flat.mean(0)).square().sum(0)])
    assert torch.allclose(moments(z).double(), want, rtol=1e-5, atol=1e-6)


def test_moments_keep_their_digits_under_a_large_offset() -> None:
    z = _features(4096, 3, offset=3e3)
    want = z.double().var(0, correction=0) * 4096
    assert torch.allclose(
        moments(z)[1].double(), want, rtol=1e-3
    )  # sum of squares less squared sum would be off by > 1


def test_moments_of_bfloat16_are_float32_and_not_rounded_on_the_way() -> None:
    z = _features(512, 3).bfloat16()
    got = moments(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, moments(z.float()))


def test_moments_of_float64_stay_float64() -> None:
    assert moments(_features(8, 3).double()).dtype == torch.float64


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_merged_parts_give_the_statistics_of_the_whole(parts) -> None:
    z = _features(16, 6, 5, offset=2.0).double()
    stacked = torch.stack([moments(part) for part in z.chunk(parts)])
    mean, std = merge_moments(stacked, z[..., 0].numel() // parts)
    flat = z.reshape(-1, 5)
    assert torch.allclose(mean, flat.mean(0), rtol=1e-12)
    assert torch.allclose(std, flat.std(0, correction=1), rtol=1e-12)


def test_a_single_token_has_no_unbiased_deviation() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        merge_moments(moments(torch.zeros(1, 3)).unsqueeze(0), 1)


def test_one_token_in_each_of_two_parts_is_enough() -> None:
    mean, std = merge_moments(torch.stack([moments(torch.zeros(1, 2)), moments(torch.full((1, 2), 2.0))]), 1)
    assert mean.tolist() == [1.0, 1.0]
    assert std.tolist() == pytest.approx([2**0.5, 2**0.5])


def test_fresh_statistics_leave_features_almost_as_they_are() -> None:
    z = _features(3, 4)
    assert torch.allclose(RunningStats(4)(z), z / (1 + STD_FLOOR))


def test_update_moves_mean_and_deviation_by_momentum_and_adds_the_floor() -> None:
    stats = RunningStats(2).double()
    stats.update(torch.tensor([4.0, -2.0]).double(), torch.tensor([3.0, 0.0]).double(), 0.25)
    assert stats.mean.tolist() == pytest.approx([1.0, -0.5], abs=1e-12)
    assert stats.std.tolist() == pytest.approx([0.75 + 0.25 * (3 + 1e-6), 0.75 + 0.25 * 1e-6], abs=1e-12)


def test_momentum_one_replaces_and_zero_leaves_alone() -> None:
    stats = RunningStats(2)
    mean, std = torch.tensor([4.0, -2.0]), torch.tensor([3.0, 5.0])
    stats.update(mean, std, 1.0)
    assert torch.equal(stats.mean, mean)
    assert torch.equal(stats.std, std + STD_FLOOR)
    stats.update(torch.zeros(2), torch.zeros(2), 0.0)
    assert torch.equal(stats.mean, mean)


def test_a_constant_channel_is_standardised_to_zero() -> None:
    z = torch.full((6, 1), 3.0)
    mean, std = merge_moments(moments(z).unsqueeze(0), 6)
    assert standardise(z, mean, std).tolist() == [[0.0]] * 6


def test_casting_a_model_to_bfloat16_leaves_its_statistics_in_float32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), RunningStats(2))
    stats = model[1]
    stats.update(torch.tensor([1.001, 2.003]), torch.tensor([1.0, 1.0]), 1.0)
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert stats.mean.dtype == stats.std.dtype == torch.float32
    assert torch.equal(stats.mean, torch.tensor([1.001, 2.003]))
    assert stats(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_double_makes_statistics_double() -> None:
    assert RunningStats(2).double()(torch.zeros(1, 2)).dtype == torch.float64


def test_statistics_are_saved_and_restored() -> None:
    stats, other = RunningStats(2), RunningStats(2)
    stats.update(torch.tensor([4.0, -2.0]), torch.tensor([3.0, 5.0]), 0.5)
    assert set(stats.state_dict()) == {"mean", "std"}
    other.load_state_dict(stats.state_dict())
    assert torch.equal(other(torch.ones(1, 2)), stats(torch.ones(1, 2)))


def test_a_step_of_statistics_never_waits_for_the_device() -> None:
    stats, z = RunningStats(3), _features(8, 3)
    with HostSyncs() as syncs:
        stats(z)
        stats.update(*merge_moments(moments(z).unsqueeze(0), 8), 0.5)
    assert syncs.found == []
