from __future__ import annotations

import math
from typing import Any

from core.report.charts import Panel
from core.report.curves import columns, curves, group, stages
from tests.core.report.runs import training_rows


def rows(**named: list[Any]) -> list[dict[str, Any]]:
    """Columns of equal length as rows; None: absent."""
    each = (dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True))
    return [
        {"stage": "main", "step": step} | {k: v for k, v in row.items() if v is not None}
        for step, row in enumerate(each, start=1)
    ]


def lines(panel: Panel) -> dict[str, list[float]]:
    return {s.name: [y for _, y in s.points] for s in panel.series}


def test_columns_are_what_is_numeric_and_was_measured() -> None:
    data = rows(loss=[1.0, "nan"], note=["x", "y"], flag=[True, False], count=[None, 3], epoch=[0, 1], eta_s=[9.0, 8.0])
    found = columns(data)
    assert list(found) == ["loss", "count"]
    assert found["count"] == [(2.0, 3.0)]
    assert math.isnan(found["loss"][1][1])


def test_a_teachers_name_at_the_end_makes_a_line_of_a_shared_panel() -> None:
    teachers = ["b", "a_b", "c"]
    assert group("loss/x_a_b", teachers) == ("loss/x", "a_b")
    assert group("loss/x_b", teachers) == ("loss/x", "b")
    assert group("weight/c", teachers) == ("weight", "c")
    assert group("abc", teachers) == ("abc", "")
    assert group("heldout_anything", teachers) == ("anything", "held out")


def test_panels_come_from_names_alone_whatever_the_method() -> None:
    foo = {"foo_a": [1.0, 2.0], "foo_b": [3.0, 4.0], "foo": [5.0, 6.0]}
    c = curves(rows(loss=[3.0, 2.0], **foo, bar_a=[7.0, 8.0], entropy=[9.0, 1.0]), ["a", "b"])
    assert [p.title for p in c.main] == ["Loss"]
    assert [p.title for p in c.teachers] == ["bar", "foo"]
    assert lines(c.teachers[1]) == {"all": [5.0, 6.0], "a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert [p.title for p in c.others] == ["entropy"]


def test_a_teacher_has_one_colour_in_all_panels() -> None:
    c = curves(rows(foo_a=[1.0, 2.0], foo_b=[3.0, 4.0], bar_b=[7.0, 8.0]), ["b", "a"])
    styles = {(s.name, s.style) for panel in c.teachers for s in panel.series}
    assert styles == {("a", "s0"), ("b", "s1")}


def test_training_and_heldout_loss_share_a_panel() -> None:
    c = curves(rows(loss=[3.0, 2.0, 1.0], heldout_loss=[4.0, None, 2.5]), [])
    assert lines(c.main[0]) == {"training": [3.0, 2.0, 1.0], "held out": [4.0, 2.5]}


def test_shares_are_shown_in_percent() -> None:
    [panel] = curves(rows(data_wait=[0.1, 0.25]), []).main
    assert panel.unit == "% of time"
    assert lines(panel) == {"": [10.0, 25.0]}


def test_a_column_that_repeats_another_is_shown_once() -> None:
    c = curves(rows(loss=[3.0, 2.0], same=[3.0, 2.0], other=[3.0, 2.5]), [])
    assert [p.title for p in c.others] == ["other"]


def test_a_column_that_never_changes_is_said_and_not_drawn() -> None:
    c = curves(rows(loss=[3.0, 2.0], zeros=[0, 0], lr=[0.1, 0.1]), [])
    assert c.constant == {"zeros": 0.0}
    assert [p.title for p in c.main] == ["Loss", "Learning rate"]
    assert c.others == []


def test_rows_that_are_not_finite_are_counted_by_column() -> None:
    assert curves(rows(loss=[1.0, "nan", "inf"], lr=[1.0, 2.0, 3.0]), []).broken == {"loss": 2}


def test_stages_begin_behind_the_last_step_of_the_one_before() -> None:
    two = training_rows(3, stage="small") + training_rows(4, stage="large", first=3)
    assert stages(two) == [(0.0, "small"), (3.0, "large")]
    assert stages(training_rows(3)) == []


def test_all_panels_have_the_steps_of_the_whole_run() -> None:
    c = curves(rows(loss=[3.0, 2.0, 1.0], late=[None, 5.0, 6.0]), [])
    assert {panel.span for panel in c.main + c.others} == {(1.0, 3.0)}
