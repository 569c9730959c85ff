from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.find import method_of
from tests.golden.recorded import RESULTS
from tests.golden.runner import find_cases, methods, run_case

torch.set_num_threads(1)

CASES = [path for method in methods() for path in find_cases(Path(__file__).parent / method)]


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_product_reproduces_the_recorded_case(path: Path) -> None:
    result = run_case(path)
    assert result.ok, result.line
    if method_of(path, methods()) in RESULTS:
        assert result.unread == (), "arrays of a case that decide nothing"


def test_every_recorded_case_is_there() -> None:
    named = [line.split("`")[1] for line in (Path(__file__).parent / "unic" / "README.md").read_text().splitlines()
             if line.startswith("| `")]  # fmt: skip
    assert sorted(named) == sorted(path.stem for path in CASES if path.parent.name == "unic")


def test_every_method_has_all_its_cases() -> None:
    here = {method: sum(method in path.parts for path in CASES) for method in methods()}
    assert here == {"unic": 23, "proteus": 49, "fd": 44, "dime_fm": 43, "udi": 39}
