from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config import ConfigError
from core.evaluate import elevater, metrics, zeroshot
from core.models.text import TextTower, text_tower, tokenize
from core.models.weights import WeightsError


def test_the_first_fifth_of_every_class_validates() -> None:
    labels = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0])
    train, val = elevater.split_trainval(labels, 0.2)
    assert val.tolist() == [0, 1, 2]
    assert sorted([*train, *val]) == list(range(9))


def test_samples_of_several_labels_count_for_all_of_them() -> None:
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]])
    train, val = elevater.split_trainval(labels, 0.5)
    assert val.tolist() == [0, 2]
    assert train.tolist() == [1, 3]


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_probe_is_a_linear_layer_behind_a_batch_norm_under_sgd(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, start = torch.randn(9, 4, generator=generator).double(), torch.randn(3, 4, generator=generator).double()
    labels = torch.randint(0, 3, (9,), generator=generator)
    wanted = F.one_hot(labels, 3) if multilabel else labels
    orders = [torch.randperm(9, generator=generator) for _ in range(3)]
    norm, head = torch.nn.BatchNorm1d(4, affine=False).double(), torch.nn.Linear(4, 3).double()
    head.weight.data, head.bias.data = start.clone(), torch.zeros(3).double()
    sgd = torch.optim.SGD(head.parameters(), 0.1, 0.9, weight_decay=0.01)
    loss = torch.nn.BCEWithLogitsLoss() if multilabel else torch.nn.CrossEntropyLoss()
    for order in orders:
        for index in torch.split(order, 4)[:2]:  # the third batch is a single sample
            sgd.zero_grad()
            loss(head(norm(x[index])), wanted[index].double() if multilabel else wanted[index]).backward()
            sgd.step()
    found = elevater.train_probe(
        x, wanted, x, labels, weight_CD=start, lr=0.1, weight_decay=0.01, orders=orders, batch=4
    )
    torch.testing.assert_close(found.weight, head.weight.detach())
    torch.testing.assert_close(found.bias, head.bias.detach())
    torch.testing.assert_close(found.standardiser.var, norm.running_var)
    assert found.best == max(found.scores)


def test_the_search_finds_the_best_of_a_smooth_score_and_keeps_to_the_edges() -> None:
    found = elevater.search(lambda lr, decay: 50 - (np.log10(decay) - 1.2) ** 2 - np.log10(lr) ** 2)
    assert found.lr == pytest.approx(0.1)
    assert np.log10(found.weight_decay) == pytest.approx(1.25)
    assert len(found.trials) == 6 * (7 + 8)
    edge = elevater.search(lambda lr, decay: 50 - np.log10(decay), learning_rates=(0.1,))
    assert edge.weight_decay == pytest.approx(1e-6)
    assert len(edge.trials) == 7 + 4


def test_a_trial_that_fails_counts_as_nothing_and_is_recorded_as_nan() -> None:
    def score(lr: float, decay: float) -> float:
        if lr > 0.05:
            raise RuntimeError("did not converge")
        return float("nan") if decay > 10 else 50 - np.log10(decay) ** 2

    found = elevater.search(score)
    assert (found.lr, found.weight_decay) == (pytest.approx(1e-6), pytest.approx(1.0))
    assert all(np.isnan(value) == (lr > 0.05 or decay > 10) for lr, decay, value in found.trials)
    with pytest.raises(RuntimeError, match="did not converge"):
        elevater.search(score, learning_rates=(0.1,))


def test_of_equal_scores_the_first_wins() -> None:
    assert elevater.search(lambda lr, decay: 1.0).lr == pytest.approx(1e-6)


def test_a_class_without_a_sample_neither_counts_nor_attracts() -> None:
    labels, scores = np.array([0, 0, 2]), np.array([[0.4, 0.6, 0.0], [0.1, 0.9, 0.2], [0.0, 0.9, 0.1]])
    assert metrics.accuracy(labels, scores) == 0
    assert metrics.mean_per_class(labels, scores) == pytest.approx((0.5 + 1) / 2)


def test_ties_count_half_below_the_curve() -> None:
    scores = np.array([[0, 0.5], [0, 0.5], [0, 0.9], [0, 0.1]])
    assert metrics.roc_auc(np.array([1, 0, 1, 0]), scores) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="both classes"):
        metrics.roc_auc(np.zeros(4, np.int64), scores)


def test_precision_at_eleven_recalls() -> None:
    positive, score = np.array([[1], [0], [1], [0]]), np.array([[0.9], [0.8], [0.7], [0.1]])
    assert metrics.eleven_points(positive, score) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        metrics.metric("acuracy")


def test_prompts_count_alike_whatever_their_length_and_the_first_name_is_taken() -> None:
    texts = torch.tensor([[[100.0, 0.0], [0.0, 1.0]], [[-3.0, 0.0], [-1.0, 0.0]]])
    torch.testing.assert_close(zeroshot.classifier(texts).T, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))
    assert zeroshot.prompts(["cat", "puss"], ["a {}.", "{}"]) == ["a cat.", "cat"]
    found = zeroshot.probabilities(torch.tensor([[0.0, 7.0]]), torch.eye(2), scale=2.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0]]).softmax(-1))


def test_a_text_that_is_too_long_loses_its_end_token() -> None:
    ids = tokenize(["a cat", "cat " * 100], slots=10)
    assert ids[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0, 0, 0]
    assert 49407 not in ids[1]


def test_a_text_tower_is_sized_by_its_weights() -> None:
    torch.manual_seed(0)
    tower = TextTower(width=64, layers=1, heads=1, dim=8, slots=12).eval()
    state = tower.model.state_dict() | {"visual.proj": torch.zeros(2, 2), "logit_scale": torch.zeros(())}
    found = text_tower(state)
    assert found.slots == 12
    torch.testing.assert_close(found.encode(["a cat", "two dogs"]), tower.encode(["a cat", "two dogs"]))
    state.pop("ln_final.weight")
    with pytest.raises(WeightsError, match=r"missing ln_final\.weight"):
        text_tower(state)
    with pytest.raises(WeightsError, match="no CLIP text tower"):
        text_tower({})
