"""`make demo`, as on a machine that has nothing but the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli import Shell

pytestmark = pytest.mark.system


def test_the_demo_distils_evaluates_exports_and_reports_and_is_not_repeated(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shorter = ("--set", "evaluate.seeds=1")  # of three untrained students
    first = shell("demo", *shorter, timeout_s=900)
    assert re.search(r"knn +student", first)
    assert re.search(r"linear: student top-1 .* with 1 seed\(s\); at least .* as asked", first)
    assert "NOT REACHED" not in first
    report = Path(re.search(r"report: (\S+)", first)[1])
    page = report.read_text()
    assert "<svg" in page
    assert "http://127" not in page, "the report stands alone"
    [run] = re.findall(r"^run: (\S+)", first, re.M)
    assert run in shell("status"), "also where nobody names its store"
    steps = shell.type(first.replace("make demo FRESH=1", ""), "eval", "export", "report", "status", "logs")
    assert re.search(r"knn +student", steps["eval"])
    runs = sorted((tmp_path / ".retort" / "demo" / "runs").iterdir())
    second = shell("demo", *shorter, timeout_s=300)
    assert "already done" in second
    assert re.search(r"knn +student", second)
    assert sorted((tmp_path / ".retort" / "demo" / "runs").iterdir()) == runs
    for run in runs:
        assert len(list((run / "transitions").iterdir())) == 4, "created, queued, running, succeeded, and no more"
