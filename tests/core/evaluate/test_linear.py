from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from core.evaluate.features import FeatureSet
from core.evaluate.linear import (
    epoch_lr,
    initial,
    linear_probe,
    probe,
    shuffled_classes,
    split_trainval,
    train_linear,
)

torch.set_num_threads(1)

CLASSES, DIM, N = 4, 6, 70


def blobs(n: int = N, noise: float = 1.0, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0)) * 2
    return centres[labels] + noise * torch.randn(n, DIM, generator=generator), labels


def start(seed: int = 3) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = initial(CLASSES, DIM, generator)
    return weight, bias, [torch.randperm(N, generator=generator) for _ in range(5)]


def by_torch(x: Tensor, y: Tensor, lr: float, decay: float, batch: int) -> nn.Linear:
    """The same training with torch's own layer, loss and optimiser."""
    weight, bias, orders = start()
    layer = nn.Linear(DIM, CLASSES).double()
    layer.load_state_dict({"weight": weight.double(), "bias": bias.double()})
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    for epoch, order in enumerate(orders):
        optimiser.param_groups[0]["lr"] = epoch_lr(epoch, lr, len(orders))
        for index in order.split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(x[index]), y[index]).backward()
            optimiser.step()
    return layer


def test_every_point_of_a_batched_search_is_trained_as_alone_by_torch() -> None:
    x, y = blobs()
    x = x.double()
    weight, bias, orders = start()
    points: Sequence[tuple[float, float]] = [(0.1, 0.0), (1.0, 1e-2), (0.5, 0.3)]
    lrs, decays = zip(*points, strict=True)
    got = train_linear(x, y, lrs, decays, weight_CD=weight, bias_C=bias, orders=orders, batch=32)  # 70 = 32 + 32 + 6
    for g, (lr, decay) in enumerate(points):
        layer = by_torch(x, y, lr, decay, 32)
        assert torch.allclose(got.weight[g], layer.weight, rtol=1e-10)
        assert torch.allclose(got.bias[g], layer.bias, rtol=1e-10)
        assert torch.allclose(got.logits(x)[g], layer(x), rtol=1e-9)


def test_the_first_two_epochs_run_at_the_full_rate() -> None:
    rates = [epoch_lr(epoch, 2.0, 10) for epoch in range(10)]
    assert rates[0] == rates[1] == 2.0
    assert rates[6] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in zip(rates[1:], rates[2:], strict=False))


def test_the_start_is_uniform_within_the_inverse_root_of_the_width() -> None:
    weight, bias = initial(100, 64, torch.Generator().manual_seed(0))
    for drawn in (weight, bias):
        assert drawn.abs().max() <= 1 / 8
        assert drawn.abs().max() > 0.9 / 8
    again = initial(100, 64, torch.Generator().manual_seed(0))
    assert torch.equal(weight, again[0])


def classes_of(*sizes: int) -> dict[int, Tensor]:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    return shuffled_classes(labels[torch.randperm(len(labels), generator=generator)], generator)


def sizes_of(shuffled: dict[int, Tensor], val: Tensor) -> list[int]:
    chosen = set(val.tolist())
    return [len(chosen & set(index.tolist())) for index in shuffled.values()]


def test_shuffled_classes_hold_every_sample_once_under_its_label() -> None:
    labels = torch.tensor([2, 0, 2, 2, 0, 7])
    groups = shuffled_classes(labels, torch.Generator().manual_seed(0))
    assert {c: sorted(index.tolist()) for c, index in groups.items()} == {0: [1, 4], 2: [0, 2, 3], 7: [5]}


def test_a_fifth_of_every_class_validates_and_nothing_is_lost() -> None:
    shuffled = classes_of(10, 7, 25, 9)
    train, val = split_trainval(shuffled, 0.2)
    assert sizes_of(shuffled, val) == [2, 1, 5, 1]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(51))


def test_a_small_class_gives_one_sample_and_leaves_later_classes_alone() -> None:
    shuffled = classes_of(10, 2, 10, 1, 10)
    _, val = split_trainval(shuffled, 0.2)
    assert sizes_of(shuffled, val) == [2, 1, 2, 0, 2]


def test_the_released_split_carries_a_small_class_s_share_on() -> None:
    shuffled = classes_of(10, 3, 10, 2, 10)
    _, val = split_trainval(shuffled, 0.2, released_bug=True)
    assert sizes_of(shuffled, val) == [2, 1, 3, 1, 5]


def test_the_released_split_refuses_a_class_of_one() -> None:
    with pytest.raises(ValueError, match="class 1 has one sample"):
        split_trainval(classes_of(10, 1), 0.2, released_bug=True)


def test_the_probe_learns_what_is_linear_and_repeats_itself() -> None:
    (train, train_labels), (test, test_labels) = blobs(300, 0.3), blobs(100, 0.3, seed=2)
    found = linear_probe(train, train_labels, test, test_labels, num_classes=CLASSES, epochs=20)
    assert found.top1 > 97
    assert found.val_top1 > 97
    assert found.top5 == 100
    assert found == linear_probe(train, train_labels, test, test_labels, num_classes=CLASSES, epochs=20)


def test_nothing_is_chosen_by_the_test_samples() -> None:
    (train, train_labels), (test, test_labels) = blobs(200, 2.0), blobs(50, 2.0, seed=2)
    honest = linear_probe(train, train_labels, test, test_labels, num_classes=CLASSES, epochs=5)
    other = linear_probe(train, train_labels, -test, (test_labels + 1) % CLASSES, num_classes=CLASSES, epochs=5)
    assert (honest.lr, honest.weight_decay, honest.val_top1) == (other.lr, other.weight_decay, other.val_top1)
    assert honest.top1 != other.top1


def test_the_best_point_on_the_validation_split_is_taken() -> None:
    (train, train_labels), (test, test_labels) = blobs(200, 0.5), blobs(50, 0.5, seed=2)
    settings = {"num_classes": CLASSES, "epochs": 10, "weight_decays": (0.0,)}
    useless, useful = 1e-6, 10.0
    for rates in ((useless, useful), (useful, useless)):
        assert linear_probe(train, train_labels, test, test_labels, learning_rates=rates, **settings).lr == useful


def test_the_protocol_reports_accuracies_and_the_chosen_point() -> None:
    row = probe(FeatureSet(*blobs(100)), FeatureSet(*blobs(30, seed=2)), CLASSES, seed=0)
    assert row.keys() == {"top1", "top5", "lr", "weight_decay", "val_top1"}
    assert row["top1"] > 50
