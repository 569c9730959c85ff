from __future__ import annotations

import pytest
import torch
from torch import nn

from core.evaluate.diagnostics import (
    Diagnostics,
    attention_distance,
    attention_of,
    column_score,
    diagonal_score,
    head_cosine,
    patch_distances,
    watched,
)  # fmt: skip
from core.evaluate.landscape import classification, direction, filter_normalised, surface
from core.evaluate.lars_probe import LarsProbe, accuracy, fit_probe
from core.models.fused import fuse_attention
from core.models.students import create

GRID = (14, 14)


def test_uniform_attention_looks_as_far_as_the_notes_say() -> None:
    uniform = torch.full((1, 2, 197, 197), 1 / 197)
    distances = patch_distances(GRID, 16)
    assert attention_distance(uniform, distances).tolist() == pytest.approx([116.5] * 2, abs=0.05)
    assert attention_distance(uniform, distances, renormalise=False)[0] == pytest.approx(116.5 * 196 / 197, abs=0.05)


def test_heads_that_look_at_themselves_and_at_one_key_score_as_such() -> None:
    own = torch.eye(9)
    column = torch.zeros(9, 9).index_fill_(1, torch.tensor([4]), 1.0)
    maps = torch.stack([own, column])
    assert diagonal_score(maps, (3, 3)).tolist() == pytest.approx([1.0, 1.0])
    assert column_score(maps)[0] == 0
    assert column_score(maps)[1] > 2
    heads = nn.functional.pad(maps, (1, 0, 1, 0))[None]
    assert head_cosine(heads) == pytest.approx(1 / 9), "equal for the query in the middle alone"
    assert head_cosine(heads[:, [0, 0]]) == pytest.approx(1.0)


def test_maps_added_in_pieces_average_over_images() -> None:
    maps = torch.rand(3, 2, 10, 10).softmax(-1)
    whole, pieces = Diagnostics((3, 3), 16), Diagnostics((3, 3), 16)
    whole.add(maps)
    pieces.add(maps[:1])
    pieces.add(maps[1:])
    for name, value in whole.results().items():
        torch.testing.assert_close(pieces.results()[name], value)
    with pytest.raises(ValueError, match="at least one image"):
        Diagnostics((3, 3), 16).results()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ],
)
def test_watched_maps_are_those_that_the_network_uses(name: str, args: dict[str, bool]) -> None:
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 48}
    model = create(name, {**sizes, **args}, None, "student").eval()
    fuse_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    found = []

    def check(module, inputs, named, output) -> None:  # type: ignore[no-untyped-def]
        maps = attention_of(module, inputs[0], named.get("shared_rel_pos_bias"))
        value = module.qkv(inputs[0])[..., 48:] + (module.v_bias if getattr(module, "v_bias", None) is not None else 0)
        heads = maps @ value.unflatten(-1, (2, 12)).transpose(1, 2)
        found.append(module.proj(heads.transpose(1, 2).flatten(2)) - output)

    for block in model.blocks:
        block.attn.register_forward_hook(check, with_kwargs=True)
    layers = [Diagnostics((3, 3), 16) for _ in model.blocks]
    with torch.no_grad(), watched(model, layers):
        model(torch.randn(2, 3, 48, 48))
    assert max(difference.abs().max() for difference in found) < 1e-4
    assert [layer.images for layer in layers] == [2, 2]


def test_directions_have_the_weights_length_filter_by_filter_and_leave_biases_alone() -> None:
    weights = {"w": torch.randn(3, 4, 5), "b": torch.randn(3)}
    first = direction(weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first["w"].flatten(1).norm(dim=1), weights["w"].flatten(1).norm(dim=1))
    assert first["b"].count_nonzero() == 0
    assert torch.equal(first["w"], direction(weights, torch.Generator().manual_seed(0))["w"])


def test_the_surface_is_the_loss_at_moved_weights() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moves = tuple(filter_normalised({n: torch.randn_like(w) for n, w in weights.items()}, weights) for _ in range(2))
    loss, hits = surface(model, (moves[0], moves[1]), [-0.5, 0.0, 1.0], classification(x, y))
    at = weights["weight"] + 1.0 * moves[0]["weight"] - 0.5 * moves[1]["weight"]
    want = nn.functional.cross_entropy(x @ at.T + weights["bias"], y)
    assert loss[2, 0].item() == pytest.approx(want.item(), rel=1e-5)
    assert loss[1, 1].item() == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    assert hits.shape == (3, 3)
    assert torch.equal(model.weight.detach(), weights["weight"]), "the model itself does not move"


def test_the_probe_learns_what_can_be_told_apart() -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = nn.functional.one_hot(labels, 3).float() * 4 + torch.randn(60, 3)
    model = LarsProbe(3, 3)
    losses = fit_probe(model, [(x, labels, 4.0)] * 150)
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, x, labels) > 90
