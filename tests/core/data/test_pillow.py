from __future__ import annotations

import numpy as np
import torch

from core.data.pillow import NORMS, clipped_boxes, clipped_sizes, crop_pil, eval_pil, resize_pil, standardised


def test_each_statistics_turn_their_own_mean_into_zero() -> None:
    for norm, (mean, std) in NORMS.items():
        image = (torch.tensor(mean) * 255).round().to(torch.uint8).view(3, 1, 1).expand(3, 8, 8)
        assert standardised(image, norm).abs().max() < 0.5 / 255 / min(std) + 1e-6


def test_the_evaluation_takes_the_middle_of_a_slightly_larger_image() -> None:
    image = torch.zeros(3, 256, 300, dtype=torch.uint8)
    image[:, 16:240, 38:262] = 255
    white = (1 - torch.tensor(NORMS["imagenet"][0])) / torch.tensor(NORMS["imagenet"][1])
    torch.testing.assert_close(eval_pil(image, 224).mean((1, 2)), white)
    assert eval_pil(image, 224, norm="clip").mean((1, 2))[0] != white[0]


def test_a_training_crop_is_mirrored_after_its_resize() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = crop_pil(image, [2, 3, 10, 20], False, 8)
    assert torch.equal(crop_pil(image, [2, 3, 10, 20], True, 8), crop.flip(-1))
    assert not torch.equal(crop_pil(image, [2, 3, 10, 20], False, 8, "bicubic"), crop)


def test_a_crop_that_does_not_fit_is_cut_down_and_never_drawn_again() -> None:
    sizes = np.array([[10, 100], [50, 50]])
    assert clipped_sizes(sizes, np.array([1.0, 1.0]), np.log([1.0, 4.0])).tolist() == [[10, 32], [25, 50]]
    boxes = clipped_boxes(sizes.repeat(100, 0), np.random.default_rng(0).random((200, 4)))
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes.repeat(100, 0)).all()
    assert (boxes[:, 2:] > 0).all()


def test_one_size_keeps_the_shape_and_two_squash_it() -> None:
    image = torch.zeros(3, 10, 30, dtype=torch.uint8)
    assert resize_pil(image, [5]).shape == (3, 5, 15)
    assert resize_pil(image, [5, 5]).shape == (3, 5, 5)
