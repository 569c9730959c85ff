import numpy as np
import pytest

from core.data.draws import permutation, uniform

SAMPLES = np.arange(20_000)


def test_values_are_pinned_for_ever():
    got = uniform(22, 3, np.array([0, 1, 1_281_166]), 1, 2)
    want = [
        [0.8704278604024731, 0.5926827837283036],
        [0.4655407734867332, 0.22600285741494985],
        [0.6309867344952682, 0.2570424165537075],
    ]
    np.testing.assert_array_equal(got, want)
    assert permutation(8, 22, 0, 1).tolist() == [7, 2, 6, 3, 1, 0, 4, 5]


@pytest.mark.parametrize("key", [(0, 0, 0), (22, 1, 1), (2**63, 7, -1)])
def test_draws_are_uniform(key: tuple[int, int, int]):
    seed, epoch, view = key
    draws = uniform(seed, epoch, SAMPLES, view, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, bins=50, range=(0, 1))[0]
        chi2 = ((counts - 400) ** 2 / 400).sum()
        assert 20 < chi2 < 98  # 49 degrees of freedom: outside with probability 1e-4


def test_draws_of_neighbours_are_uncorrelated():
    base = uniform(5, 2, SAMPLES, 0, 2)
    others = {
        "sample": uniform(5, 2, SAMPLES + 1, 0, 2)[:, 0],
        "epoch": uniform(5, 3, SAMPLES, 0, 2)[:, 0],
        "view": uniform(5, 2, SAMPLES, 1, 2)[:, 0],
        "seed": uniform(6, 2, SAMPLES, 0, 2)[:, 0],
        "column": base[:, 1],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < 0.03, name  # 4 standard deviations


def test_a_draw_depends_on_its_own_key_alone():
    whole = uniform(1, 2, SAMPLES[:100], 0, 6)
    np.testing.assert_array_equal(uniform(1, 2, SAMPLES[40:41], 0, 6)[0], whole[40])
    np.testing.assert_array_equal(uniform(1, 2, SAMPLES[:100], 0, 3), whole[:, :3])


def test_epoch_and_seed_do_not_stand_for_each_other():
    assert not np.array_equal(uniform(1, 2, SAMPLES[:4], 0, 1), uniform(2, 1, SAMPLES[:4], 0, 1))


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_holds_every_number_once(count: int):
    assert sorted(permutation(count, 3).tolist()) == list(range(count))


def test_permutations_are_equally_likely():
    orders = [tuple(permutation(3, key).tolist()) for key in range(3000)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 26  # 5 degrees of freedom: above with probability 1e-4
