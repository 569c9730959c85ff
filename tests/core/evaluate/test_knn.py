from __future__ import annotations

import math

import pytest
import torch

from core.evaluate.features import FeatureSet
from core.evaluate.knn import K, knn, probe

torch.set_num_threads(1)

CLASSES = 7


def features(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(n, 6, generator=generator), labels


def by_loops(train: torch.Tensor, labels: torch.Tensor, row: torch.Tensor, k: int, temperature: float) -> list[int]:
    similarities = [
        (float(row @ other) / math.sqrt(float(row @ row) * float(other @ other)), int(label))
        for other, label in zip(train, labels, strict=True)
    ]
    votes = [0.0] * CLASSES
    for similarity, label in sorted(similarities, reverse=True)[:k]:
        votes[label] += math.exp(similarity / temperature)
    return sorted(range(CLASSES), key=lambda c: -votes[c])


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_neighbours_vote_by_the_exponential_of_their_cosine(temperature) -> None:
    train, train_labels = features(60, 1)
    test, test_labels = features(25, 2)
    got = knn(train, train_labels, test, test_labels, [3, 20], temperature, num_classes=CLASSES)
    for k, (top1, top5, pred) in got.items():
        ranked = [by_loops(train.double(), train_labels, row, k, temperature) for row in test.double()]
        assert pred.tolist() == [classes[0] for classes in ranked]
        pairs = list(zip(ranked, test_labels.tolist(), strict=True))
        assert top1 == pytest.approx(100 * sum(c[0] == y for c, y in pairs) / 25)
        assert top5 == pytest.approx(100 * sum(y in c[:5] for c, y in pairs) / 25)


def test_results_do_not_depend_on_the_chunk_or_the_scale_of_features() -> None:
    (train, train_labels), (test, test_labels) = features(60, 1), features(25, 2)
    want = knn(train, train_labels, test, test_labels, [5], num_classes=CLASSES, chunk=25)[5]
    got = knn(train * 7, train_labels, test * 0.1, test_labels, [5], num_classes=CLASSES, chunk=4)[5]
    assert got[:2] == want[:2]
    assert torch.equal(got[2], want[2])


def test_more_neighbours_than_samples_means_all_of_them() -> None:
    (train, train_labels), (test, test_labels) = features(10, 1), features(25, 2)
    got = knn(train, train_labels, test, test_labels, [10, 200], num_classes=CLASSES)
    assert torch.equal(got[10][2], got[200][2])


def test_a_small_temperature_does_not_overflow() -> None:
    (train, train_labels), (test, test_labels) = features(60, 1), features(25, 2)
    cold = knn(train, train_labels, test, test_labels, [20], 1e-3, num_classes=CLASSES)[20]
    nearest = knn(train, train_labels, test, test_labels, [1], num_classes=CLASSES)[1]
    assert torch.equal(cold[2], nearest[2])


def test_with_fewer_than_five_classes_top5_is_certain() -> None:
    train, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    top1, top5, _ = knn(train, labels, train, (labels + 1) % 3, [1], num_classes=3)[1]
    assert (top1, top5) == (0.0, 100.0)


def test_the_protocol_reports_the_papers_number_of_neighbours() -> None:
    (train, train_labels), (test, test_labels) = features(60, 1), features(25, 2)
    row = probe(FeatureSet(train, train_labels), FeatureSet(test, test_labels), CLASSES, seed=0)
    top1, top5, _ = knn(train, train_labels, test, test_labels, [K], num_classes=CLASSES)[K]
    assert (row["top1"], row["top5"]) == (top1, top5)
