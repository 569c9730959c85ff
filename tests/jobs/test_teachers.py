from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jobs import cli
from jobs.spec import REPOSITORY

WITHOUT_TORCH = "import sys; from jobs import cli; cli.main(['teachers']); sys.exit('torch' in sys.modules)"


def test_every_known_set_of_weights_has_an_aligned_row_with_its_proof(capsys: pytest.CaptureFixture[str]) -> None:
    from core.models.known import STUDENTS, TEACHERS

    assert cli.main(["teachers"]) == 0
    teachers, students, *_ = capsys.readouterr().out.split("\n\n")
    for printed, entries in ((teachers, TEACHERS), (students, STUDENTS)):
        _, head, _, *rows = printed.splitlines()
        assert [row.split()[0] for row in rows] == list(entries)
        for row, known in zip(rows, entries.values(), strict=True):
            columns = {name: row[head.index(name) :] for name in ("timm model", "weights", "licence", "conversion")}
            assert columns["timm model"].startswith(known.timm)
            assert columns["weights"].startswith(known.weights)
            assert columns["licence"].startswith(known.licence)
            assert columns["conversion"] == known.status


def test_programs_get_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teachers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dime-fm-b32"]["kind"] == "student"
    assert rows["dime-fm-b32"]["args"] == {"num_classes": 768, "norm_eps": 1e-12}
    assert rows["metaclip-h14"]["status"] == "keys only"


def test_the_table_costs_no_import_of_torch() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
