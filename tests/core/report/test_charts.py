from __future__ import annotations

import math
import re

import pytest

from core.report.charts import LARGE, Panel, Series, chart, draw, key, log_ticks, thin, ticks
from core.report.page import Html
from tests.core.report.pages import Element, read

NAN = math.nan


def line(*ys: float) -> Series:
    return Series("", [(float(x), y) for x, y in enumerate(ys, start=1)])


def svg(markup: Html) -> Element:
    return read(markup).all("svg")[0]


def labels(drawing: Element, anchor: str) -> list[str]:
    return [t.text for t in drawing.all("text") if t.attributes["text-anchor"] == anchor]


def points(drawing: Element) -> list[tuple[float, float]]:
    [path] = drawing.all("path", "curve")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attributes["d"])]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]),
    (0.52, 0.78, [0.55, 0.6, 0.65, 0.7, 0.75]),
    (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
    (0, 1.9e-5, [0, 5e-6, 1e-5, 1.5e-5]),
    (1000, 53000, [10000, 20000, 30000, 40000, 50000]),
])  # fmt: skip
def test_ticks_are_round_numbers_inside_the_range(low, high, expected) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_logarithmic_ticks_are_powers_of_ten_and_not_too_many() -> None:
    assert log_ticks(3e-5, 2.0) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0])
    assert log_ticks(1e-9, 1e6) == pytest.approx([1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6])


def test_a_line_goes_from_edge_to_edge_and_higher_values_are_drawn_higher() -> None:
    (x1, y1), (x2, y2), (x3, y3) = points(svg(chart(Panel("t", [line(1.0, 3.0, 2.0)]))))
    assert (x1, x3) == (44, 322)
    assert x2 == pytest.approx((x1 + x3) / 2)
    assert y2 < y3 < y1
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.1)


def test_values_over_several_powers_of_ten_get_a_logarithmic_axis_that_is_named() -> None:
    figure = read(chart(Panel("t", [line(1.0, 0.1, 0.01, 0.001)], unit="m")))
    heights = [y for _, y in points(figure.all("svg")[0])]
    gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.15)
    assert "t m log scale" in figure.text
    assert "log scale" not in read(chart(Panel("t", [line(1.0, 0.5)], unit="m"))).text


def test_an_axis_from_zero_stays_linear() -> None:
    drawing = svg(chart(Panel("t", [line(1000.0, 1.0)], zero=True)))
    assert labels(drawing, "end")[:3] == ["0", "200", "400"]


@pytest.mark.parametrize(("values", "expected"), [
    ((0.0, 2e-5), ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
    ((0.0, 52000.0), ["0", "10k", "20k", "30k", "40k", "50k"]),
    ((0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
])  # fmt: skip
def test_labels_of_one_axis_are_short_and_alike(values, expected) -> None:
    assert labels(svg(chart(Panel("t", [line(*values)], zero=True))), "end")[:-1] == expected


def test_steps_are_labelled_with_whole_numbers() -> None:
    assert labels(svg(chart(Panel("t", [line(1.0, 2.0, 3.0)]))), "middle") == ["1", "2", "3"]


def test_a_value_that_is_not_finite_breaks_the_line_and_is_crossed() -> None:
    drawing = svg(chart(Panel("t", [line(1.0, 2.0, NAN, 2.0, 1.0)])))
    assert drawing.all("path", "curve")[0].attributes["d"].count("M") == 2
    assert drawing.all("path", "broken")[0].attributes["d"].count("M") == 1
    assert "1 not finite" in drawing.attributes["aria-label"]


@pytest.mark.parametrize("values", [(5.0,), (0.0, 0.0), (-2.0, -2.0), (1e-12, 1e12)])
def test_odd_ranges_are_drawn_inside_the_frame(values) -> None:
    for x, y in points(svg(chart(Panel("t", [line(*values)], zero=False)))):
        assert 44 <= x <= 322
        assert 14 <= y <= 148


def test_nothing_finite_is_said_in_words() -> None:
    assert read(draw(Panel("t", [line(NAN)]))).text == "No finite value."


def test_thinning_keeps_ends_spikes_and_breaks() -> None:
    values = [(float(i), math.sin(i / 500)) for i in range(10_000)]
    values[4321] = (4321.0, 99.0)
    values[7000] = (7000.0, NAN)
    kept = thin(values, 100)
    assert len(kept) <= 310
    assert kept == sorted(kept)
    assert kept[0] == values[0]
    assert kept[-1] == values[-1]
    assert (4321.0, 99.0) in kept
    assert any(x == 7000 for x, _ in kept)


def test_few_points_are_not_thinned() -> None:
    values = [(float(i), float(i)) for i in range(300)]
    assert thin(values, 100) == values


def test_the_caption_gives_newest_values_and_names_lines_without_a_key() -> None:
    series = [Series("training", [(1, 0.5), (2, 0.25)], "s0"), Series("held out", [(1, 0.5), (2, NAN)], "s1")]
    figure = read(chart(Panel("Loss", series)))
    assert figure.all("figcaption")[0].text == "Loss training 0.25held out 0.5"


def test_marks_are_lines_with_words_except_at_the_left_edge() -> None:
    drawing = svg(chart(Panel("t", [line(1.0, 2.0, 3.0, 4.0)], marks=[(0.0, "first"), (3.0, "second")])))
    assert len(drawing.all("line", "stage")) == 1
    texts = {t.text: float(t.attributes["x"]) for t in drawing.all("text")}
    assert texts["first"] == 47
    assert texts["second"] > texts["first"]


def test_a_given_span_is_shared_whatever_the_points_are() -> None:
    [(x, _), *_] = points(svg(chart(Panel("t", [line(1.0, 2.0)], span=(0.0, 4.0)), LARGE)))
    assert x == 44 + (500 - 8 - 44) / 4


def test_a_key_shows_each_name_beside_its_line() -> None:
    found = read(key([("a", "s0"), ("b", "s1")]))
    shown = [(s.text, s.all("line")[0].attributes["class"]) for s in found.all("span")]
    assert shown == [("a", "curve s0"), ("b", "curve s1")]
