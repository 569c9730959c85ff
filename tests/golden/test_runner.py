from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.__main__ import main
from tests.golden.find import find_unit
from tests.golden.runner import Case, deviation, find_cases, judge, load_case, run_case, tolerance_of

torch.set_num_threads(1)

UNIC = Path(__file__).parent / "unic"
NAN = float("nan")


def altered(source: Path, target: Path, **changes: np.ndarray) -> None:
    """A copy of a case with some arrays replaced; `__` in a name stands for a dot."""
    with np.load(source) as archive:
        arrays = {key: archive[key] for key in archive.files}
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **arrays | {key.replace("__", "."): value for key, value in changes.items()})


def test_deviation_is_relative_above_one_and_absolute_below() -> None:
    assert deviation([101.0, 0.5], [100.0, 0.5]) == pytest.approx(0.01)
    assert deviation([1.0, 0.1], [1.0, 0.3]) == pytest.approx(0.2)
    assert deviation(torch.ones(2), np.ones(2)) == 0.0


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([NAN, 1.0], [1.0, 1.0], np.inf),
        ([1.0], [NAN], np.inf),
        ([np.inf], [np.inf], 0.0),
        ([np.inf], [1.0], np.inf),
        ([1.0], [[1.0]], np.inf),
        (["a", "b"], ["a", "b"], 0.0),
        (["a", "b"], ["a", "c"], np.inf),
        (True, True, 0.0),
        (True, False, np.inf),
        ([], [], 0.0),
    ],
)
def test_deviation_of_special_values(got, want, error) -> None:
    assert deviation(got, want) == error


def test_the_longest_unit_name_that_starts_the_file_s_name_decides(tmp_path: Path) -> None:
    shutil.copy(UNIC / "unic_loss_two_teachers.npz", tmp_path / "unic_loss_17.npz")
    shutil.copy(UNIC / "teacher_drop.npz", tmp_path / "teacher_drop_b.npz")
    shutil.copy(UNIC / "lp_subset_prenorm.npz", tmp_path / "lp_other.npz")
    assert all(run_case(path).ok for path in find_cases(tmp_path))


def test_the_method_is_found_from_a_folder_above_as_well(tmp_path: Path) -> None:
    target = tmp_path / "unic-hidden" / "more" / "clip_grad_2.npz"
    altered(UNIC / "clip_grad.npz", target, extra=np.ones(1))  # an array name that no method claims
    result = run_case(target)
    assert result.ok, result.line
    assert result.name == "more/clip_grad_2"


def test_a_wrong_result_fails_and_names_the_array(tmp_path: Path) -> None:
    altered(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz", out__norms=np.array([47.5, 0.14, 0.05]))
    result = run_case(tmp_path / "clip_grad.npz")
    assert not result.ok
    assert result.message.startswith("out.norms err")


def test_a_recorded_result_that_is_not_compared_is_told(tmp_path: Path) -> None:
    altered(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz", out__more=np.ones(1))
    result = run_case(tmp_path / "clip_grad.npz")
    assert result.unread == ("out.more",)
    assert not result.ok
    assert result.message == "out.more is recorded, but not compared"


def test_an_input_that_is_not_looked_at_is_told(tmp_path: Path) -> None:
    altered(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz", hp__more=np.ones(1))
    result = run_case(tmp_path / "clip_grad.npz")
    assert result.ok
    assert result.line.endswith("never looked at: hp.more")


def test_a_case_of_an_unknown_name_is_found_by_its_arrays(tmp_path: Path) -> None:
    shutil.copy(UNIC / "teacher_drop.npz", tmp_path / "left_out.npz")
    (tmp_path / "unic").mkdir()
    shutil.copy(UNIC / "knn.npz", tmp_path / "unic" / "neighbours.npz")
    shutil.copy(UNIC / "knn.npz", tmp_path / "knn_17.npz")  # three methods have a unit of this name
    for name in ("left_out", "unic/neighbours", "knn_17"):
        path = tmp_path / f"{name}.npz"
        assert find_unit(path, load_case(path))[0] == "unic"
        assert run_case(path).ok


def unit_of(*checks: tuple) -> object:
    """A run of a unit that yields these checks on a case with arrays out.a and out.b."""
    case = Case({"out.a": np.ones(3), "out.b": np.zeros(2), "hp.x": np.ones(1)}, Path("case.npz"))
    return judge("unic", case, [(name, got(case), want(case), tol) for name, got, want, tol in checks])


A, B = lambda case: case["out.a"], lambda case: case["out.b"]
ONES, ZEROS = lambda case: np.ones(3), lambda case: torch.zeros(2)


def test_what_a_unit_reads_from_the_file_does_not_stand_for_the_product_s() -> None:
    own = ("out.a", A, A, 0.0), ("out.b", ZEROS, B, 0.0)
    assert unit_of(*own) == ["out.a is read from the file, not computed"]
    assert unit_of(("out.a", ONES, A, 0.0), own[1]) == []


def test_arrays_are_compared_whole_in_parts_or_under_another_name() -> None:
    parts = [(f"row {i}", lambda case: np.ones(1), lambda case, i=i: case["out.a"][i : i + 1], 0.0) for i in range(3)]
    assert unit_of(*parts, ("total", ZEROS, lambda case: 1 * case["out.b"], 0.0)) == []
    assert unit_of(*parts) == ["out.b is recorded, but not compared"]
    assert unit_of(("hp.x", lambda case: np.ones(1), lambda case: case["hp.x"], 0.0)) == [
        "none of the recorded results is compared"
    ]


def test_the_tolerance_follows_the_type_that_was_recorded() -> None:
    assert tolerance_of(np.ones(1), 1e-10) == 1e-10
    assert tolerance_of(np.ones(1, np.float32), 1e-10) == 2e-5
    assert tolerance_of(np.ones(1, np.float32), 5e-6) == 5e-6
    assert tolerance_of(np.ones(1, np.float16), 1e-10) == 2e-3
    assert tolerance_of(np.ones(1, np.float32), 0.0) == 0.0  # exact stays exact


def test_deviation_is_that_of_each_number_or_of_the_largest_one() -> None:
    assert deviation([100.0, 0.5], [100.0, 0.6]) == pytest.approx(0.1)
    assert deviation([100.0, 0.5], [100.0, 0.6], each=False) == pytest.approx(0.001)
    assert deviation([np.inf, 0.5], [np.inf, 0.6], each=False) == pytest.approx(0.1)


def test_the_command_counts_passed_unknown_broken_and_absent_cases(tmp_path: Path, capsys) -> None:
    shutil.copy(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz")
    np.savez(tmp_path / "no_such_unit.npz", one=np.ones(2), two=np.ones(2))
    shutil.copy(UNIC / "clip_grad.npz", tmp_path / "center_pad.npz")  # another unit's arrays
    (tmp_path / "knn.npz").write_bytes(b"torn")
    assert main([str(tmp_path), str(tmp_path / "absent")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 4 failed"
    assert [line.split()[0] for line in lines[:-1]] == ["FAIL", "ok", "FAIL", "FAIL", "FAIL"]
    assert "no unit known" in lines[3]
    assert "KeyError" in lines[0]


def test_the_command_succeeds_when_all_pass(tmp_path: Path, capsys) -> None:
    shutil.copy(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"
