from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.__main__ import main
from tests.golden.runner import deviation, find_cases, run_case

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
    assert run_case(tmp_path / "clip_grad.npz").unread == ("out.more",)


def test_the_command_counts_passed_unknown_broken_and_absent_cases(tmp_path: Path, capsys) -> None:
    shutil.copy(UNIC / "clip_grad.npz", tmp_path / "clip_grad.npz")
    shutil.copy(UNIC / "clip_grad.npz", tmp_path / "no_such_unit.npz")
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
