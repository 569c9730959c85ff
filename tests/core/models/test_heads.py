from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.models.heads import KINDS, Ladder

torch.set_num_threads(1)

DEPTH, DIM, TEACHERS = 4, 12, {"b_teacher": 10, "a_teacher": 14}


def ladder(**settings: Any) -> Ladder:
    torch.manual_seed(0)
    arguments = {
        "dim": DIM,
        "teachers": TEACHERS,
        "blocks": range(DEPTH),
        "depth": DEPTH,
        "hidden": 7,
        "last_hidden": 20,
    }
    made = Ladder(**arguments | settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.double()


def taps(prefix: int = 1, patches: int = 5, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, prefix + patches, DIM, generator=generator).double() for _ in range(DEPTH + 1)]


def one_by_one(made: Ladder, xs: list[torch.Tensor], prefix: int) -> dict[str, dict[str, torch.Tensor]]:
    """The ladder as its formula reads: every MLP by itself, summed over blocks."""
    out = {}
    for name, kinds in made.heads.items():
        sums = {kind: sum(mlp.layers(xs[int(b) + 1]) for b, mlp in kinds[kind].items()) for kind in KINDS}
        out[name] = {"cls": sums["cls"][:, 0], "patch": sums["patch"][:, prefix:]}
    return out


@pytest.mark.parametrize("norms", [{}, {"prenorm": True}, {"midnorm": True}, {"prenorm": True, "midnorm": True}])
@pytest.mark.parametrize("blocks", [range(DEPTH), [1, 3], [0], [2, 0]])
@pytest.mark.parametrize("prefix", [1, 5])
def test_the_fused_form_equals_the_sum_of_separate_projectors_with_all_gradients(norms, blocks, prefix) -> None:
    made, xs = ladder(**norms, blocks=blocks), taps(prefix)
    for x in xs:
        x.requires_grad_()
    results = []
    for out in (made(xs, num_prefix=prefix), one_by_one(made, xs, prefix)):
        flat = torch.cat([out[name][kind].flatten() for name in sorted(TEACHERS) for kind in KINDS])
        wrt = [*made.parameters(), *xs]
        results.append([flat, *torch.autograd.grad(flat.square().sum(), wrt, allow_unused=True)])
    for fused, separate in zip(*results, strict=True):
        assert (fused is None) == (separate is None)
        if fused is not None:
            assert torch.allclose(fused, separate, rtol=1e-10, atol=1e-12)


def test_parameters_carry_the_released_names_in_sorted_teacher_order() -> None:
    names = [name for name, _ in ladder(blocks=[0, 3]).named_parameters()]
    want = [
        f"heads.{teacher}.{kind}.{block}.layers.{layer}.{what}"
        for teacher in ("a_teacher", "b_teacher")
        for kind in ("cls", "patch")
        for block in (0, 3)
        for layer in (0, 2)
        for what in ("weight", "bias")
    ]
    assert names == want


def test_a_norm_in_front_moves_the_layer_names_up_by_one() -> None:
    names = {name.split(".", 4)[4] for name, _ in ladder(prenorm=True).named_parameters()}
    assert names == {f"layers.{layer}.{what}" for layer in (0, 1, 3) for what in ("weight", "bias")}


def test_only_the_student_s_last_block_is_wide() -> None:
    assert ladder().widths == {0: 7, 1: 7, 2: 7, 3: 20}
    assert ladder(blocks=[0, 2]).widths == {0: 7, 2: 7}


def test_results_have_each_teacher_s_width() -> None:
    out = ladder()(taps())
    shapes = {name: {kind: tuple(x.shape) for kind, x in kinds.items()} for name, kinds in out.items()}
    assert shapes == {name: {"cls": (3, dim), "patch": (3, 5, dim)} for name, dim in TEACHERS.items()}


def test_weights_start_from_a_narrow_normal_and_biases_from_zero() -> None:
    torch.manual_seed(0)
    made = Ladder(256, {"t": 256}, [0], 1, 256, 512)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
            assert abs(parameter.mean().item()) < 5e-4


def test_flops_are_those_that_torch_counts() -> None:
    made = ladder()
    with FlopCounterMode(display=False) as counter:
        made(taps(patches=9, batch=2))
    assert counter.get_total_flops() == 2 * made.flops(9)


def test_flops_of_the_published_ladder() -> None:
    with torch.device("meta"):
        made = Ladder(768, dict.fromkeys("abcd", 768), range(12), 12, 768, 3072)
    assert made.flops(196) / 2e9 == pytest.approx(13.94, abs=0.005)
    assert sum(p.numel() for p in made.parameters()) == 141_723_648


@pytest.mark.parametrize("blocks", [[], [4], [-1, 0]])
def test_blocks_that_the_student_does_not_have_are_refused(blocks) -> None:
    with pytest.raises(ValueError, match="must lie in 0..3"):
        ladder(blocks=blocks)


def test_every_parameter_is_declared_as_read_from_outside_its_module() -> None:
    made = ladder()
    assert {id(p) for p in made.external_parameters()} == {id(p) for p in made.parameters()}


def test_bfloat16_weights_and_taps_work_without_autocast() -> None:
    out = ladder().bfloat16()([tap.bfloat16() for tap in taps()])
    assert out["a_teacher"]["patch"].dtype == torch.bfloat16


def test_gradients_accumulate_over_micro_batches_for_every_parameter() -> None:
    ladder = Ladder(6, {"a": 5, "b": 4}, [0, 1, 2], 3, hidden=7, last_hidden=8)
    taps = [torch.randn(2, 4, 6) for _ in range(4)]

    def backward() -> None:
        sum(out[kind].square().sum() for out in ladder(taps).values() for kind in ("cls", "patch")).backward()

    backward()
    once = {name: p.grad.clone() for name, p in ladder.named_parameters()}
    backward()
    for name, p in ladder.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], msg=name)
