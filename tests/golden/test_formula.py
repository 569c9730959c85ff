from __future__ import annotations

import math

import pytest

from tests.golden.formula import evaluate


def test_formulas_of_numbers() -> None:
    assert evaluate("80-3*(log10(lr)+2)^2", {"lr": 1e-3}) == pytest.approx(77)
    assert evaluate("floor(7 - abs(x)) if 0 < x <= 3 and not x == 2 else -1", {"x": 2.5}) == 4
    assert evaluate("floor(7 - abs(x)) if 0 < x <= 3 and not x == 2 else -1", {"x": 4.0}) == -1
    assert math.isnan(evaluate("nan if x < 1 or x > 3 else max(x, 1)", {"x": 0.0}))
    with pytest.raises(ZeroDivisionError):
        evaluate("1 / 0 if x else 1", {"x": 1.0})


@pytest.mark.parametrize("text", ["__import__('os')", "x.real", "[x][0]", "(lambda: 1)()", "abs.__class__", "y", "'a'"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a part of a formula"):
        evaluate(text, {"x": 1.0})
