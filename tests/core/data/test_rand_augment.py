from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from core.data.rand_augment import ERASE_ATTEMPTS, erase, erase_boxes, rand_augment

POLICY = "rand-m9-mstd0.5-inc1"
SAMPLES = np.arange(400)


def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_policy_s_draws_depend_on_the_key_alone_and_leave_the_global_ones() -> None:
    random.seed(3)
    np.random.seed(3)
    before = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    first = rand_augment(image(), POLICY, (1, 2, 9, 0))
    assert not first.equal(image())
    assert (random.random(), np.random.rand()) == before
    assert first.equal(rand_augment(image(), POLICY, (1, 2, 9, 0)))


@pytest.mark.parametrize("part", range(4))
def test_seed_epoch_sample_and_view_each_change_what_is_done(part: int) -> None:
    keys = np.tile([1, 2, 3, 0], (20, 1))
    keys[:, part] = np.arange(20)
    outs = [rand_augment(image(), POLICY, tuple(key)) for key in keys.tolist()]
    assert {out.shape for out in outs} == {(3, 32, 32)}
    assert len({out.numpy().tobytes() for out in outs}) > 8  # about a quarter is left as it was


def test_boxes_cover_two_to_thirty_three_per_cent_within_the_image() -> None:
    draws = np.random.default_rng(0).random((4000, 1 + 4 * ERASE_ATTEMPTS))
    boxes = erase_boxes(0.25, 224, draws)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / len(boxes) - 0.25) < 0.02
    share, ratio = erased[:, 2] * erased[:, 3] / 224**2, erased[:, 2] / erased[:, 3]
    assert 0.019 < share.min() < 0.03
    assert 0.3 < share.max() < 0.34
    assert 0.28 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 3.5
    assert (erased[:, :2] + erased[:, 2:] <= 224).all()
    assert len(np.unique(erased[:, 0])) > 100


def test_a_box_is_normal_noise_and_the_rest_of_the_image_stays() -> None:
    images = torch.full((400, 3, 32, 32), 7.0)
    out = erase(images, 1.0, 22, 0, SAMPLES)
    noise = out[out != 7.0]
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    changed = (out != 7.0).any(1)  # the same box in all channels
    assert changed.any((1, 2)).all()
    assert (out != 7.0).all(1).equal(changed)
    assert erase(images, 0.0, 22, 0, SAMPLES).equal(images)


def test_boxes_and_noise_belong_to_samples_whatever_batch_they_are_in() -> None:
    images = torch.full((8, 3, 32, 32), 7.0)
    first = erase(images, 0.5, 22, 1, SAMPLES[:8])
    assert first.equal(erase(images, 0.5, 22, 1, SAMPLES[:8]))
    assert first.equal(erase(images, 0.5, 22, 1, SAMPLES[7::-1].copy()).flip(0))
    assert first[5:].equal(erase(images[5:], 0.5, 22, 1, SAMPLES[5:8]))
    assert not first.equal(erase(images, 0.5, 22, 2, SAMPLES[:8]))
