from __future__ import annotations

import math

import pytest

from core.report.page import Html, duration, esc, join, moment, number, size, table, tag
from tests.core.report.pages import read, rows


def test_text_is_escaped_once_and_markup_is_kept() -> None:
    assert tag("p", "a < b & c", tag("b", '"d"')) == "<p>a &lt; b &amp; c<b>&quot;d&quot;</b></p>"
    assert join(["<", tag("br")], ">") == "&lt;&gt;<br>"
    assert tag("i", title='"><x') == '<i title="&quot;&gt;&lt;x"></i>'


def test_markup_put_together_as_text_is_text_again() -> None:
    assert esc(tag("b", "x") + "<i>") == "&lt;b&gt;x&lt;/b&gt;&lt;i&gt;"
    assert isinstance(tag("b"), Html)


def test_colours_of_terminals_and_control_characters_are_left_out() -> None:
    assert esc("\x1b[1;31mred\x1b[0m\x00\x08\r\nnext\ttab") == "red\nnext\ttab"


def test_a_table_has_a_header_and_one_emphasised_row() -> None:
    found = read(table([("Name", "name"), ("n", "num")], [["a", 1], ["b", 2]], strong=1))
    assert [h.text for h in found.all("th")] == ["Name", "n"]
    assert rows(found) == [["a", "1"], ["b", "2"]]
    assert [r.all("td")[0].text for r in found.all("tr", "strong")] == ["b"]


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.6405758, "0.6406"), (1.0433e-6, "1.04e-6"), (12345, "12,345"), (62.0, "62"), (100000, "100,000"),
    (2.5e9, "2.5e9"), (-0.00042, "-4.2e-4"), (math.nan, "nan"),
])  # fmt: skip
def test_numbers_are_as_short_as_they_can_be(value, text) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273600, "3 d 4 h"), (math.inf, "\u2013"),
])  # fmt: skip
def test_durations_have_two_units_at_most(seconds, text) -> None:
    assert duration(seconds) == text


def test_sizes_and_moments() -> None:
    assert [size(n) for n in (7, 344_320, 25_000_000, 3.1e12)] == ["7 B", "344 kB", "25 MB", "3.1 TB"]
    assert moment(1_800_000_000) == "2027-01-15 08:00:00 UTC"
