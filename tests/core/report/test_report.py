from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from core import report
from core.report.facts import gather
from tests.core.report.pages import Element, read, rows, section
from tests.core.report.runs import START, RunFolder, scores, training_rows


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(f"file://{tmp_path}/store")


@pytest.fixture
def finished(run: RunFolder) -> RunFolder:
    """A run with everything."""
    run.recipe().succeeded().metrics(training_rows(40)).checkpoint(20).checkpoint(40)
    margin = {"asked": 5.0, "reached": 41.5, "ok": True}
    results = scores(student=91.5, teacher_big=95.25, untrained_1=44.0, untrained_2=50.0, raw_pixels=80.0)
    run.evaluation("knn", results, margin=margin, time=4e9, settings={"classes": 10, "train_images": 1257})
    run.exported(model_name="vit_tiny", num_classes=0, img_size=32)
    return run


def page(run: RunFolder, after_s: float = 100.0) -> Element:
    return read(report.render(gather(run.store, run.root, START + after_s)))


def tiles(page: Element) -> dict[str, str]:
    return {t.all("dt")[0].text: t.all("dd")[0].text for t in page.all("div", "tile")}


def test_write_puts_one_page_into_the_run_folder_and_returns_its_address(store_uri: str) -> None:
    run = RunFolder(store_uri).recipe().succeeded().metrics(training_rows(5)).checkpoint(5)
    uri = report.write(run.store, run.root)
    assert uri == f"{store_uri}/runs/toy-0123456789/report.html"
    written = run.store.get("report.html").decode()
    assert written.startswith("<!doctype html>")
    assert read(written).all("title")[0].text == "toy: succeeded"


def test_the_page_needs_nothing_but_itself(finished: RunFolder) -> None:
    text = report.render(gather(finished.store, finished.root, START))
    found = read(text)
    for name in ("script", "link", "img", "iframe", "object", "use", "image"):
        assert found.all(name) == []
    everything = [e for name in {m.lower() for m in re.findall(r"<([a-zA-Z0-9]+)", text)} for e in found.all(name)]
    names = {attribute for element in everything for attribute in element.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_same_facts_give_the_same_page(finished: RunFolder) -> None:
    facts = gather(finished.store, finished.root, START)
    assert report.render(facts) == report.render(facts)


def test_the_headline_says_how_good_how_fast_and_how_long(finished: RunFolder) -> None:
    found = tiles(page(finished))
    assert found["knn top-1"].startswith("91.5 %")
    assert "untrained 50.0" in found["knn top-1"]
    assert "best teacher 95.2" in found["knn top-1"]
    assert found["Images/s"].startswith("101")
    assert "2.0 % of time waiting for data" in found["Images/s"]
    assert found["Steps"] == "40of 40"
    assert found["Wall time"].startswith("1 min 15 s")
    assert found["Attempts"].startswith("1")


def test_the_steps_of_a_run_in_stages_say_which_one(run: RunFolder) -> None:
    run.recipe(stages={"small": {}, "large": {"img_size": 336}}).metrics(training_rows(8, stage="small"))
    assert tiles(page(run))["Steps"] == "8in stage small, 1 of 2"
    run.metrics(training_rows(3, stage="large", first=8), attempt=2, start_step=8)
    assert tiles(page(run))["Steps"] == "11in stage large, 2 of 2"


def test_results_show_every_model_and_emphasise_the_best_student(run: RunFolder) -> None:
    run.recipe().evaluation("linear", [{"model": "student", "top1": 70.0, "top5": 90.0, "lr": 0.1},
                                       {"model": "student pooled", "top1": 72.256, "top5": 91.0},
                                       {"model": "raw pixels", "top1": 99.0, "top5": 100.0}])  # fmt: skip
    table = section(page(run), "Results").all("table")[0]
    assert [h.text for h in table.all("th")] == ["Model", "Top-1 %", "", "Top-5 %", "lr"]
    assert rows(table)[1] == ["student pooled", "72.26", "", "91.00", ""]
    assert [r.all("td")[0].text for r in table.all("tr", "strong")] == ["student pooled"]


@pytest.mark.parametrize(("asked", "reached", "ok", "said"), [
    (5.0, 41.5, True, "41.50 points above the best untrained one; the recipe asks for 5.00: reached."),
    (5.0, -2.25, False, "2.25 points below the best untrained one; the recipe asks for 5.00: missed."),
    (0.0, 1.0, True, "1.00 points above the best untrained one; the recipe asks for no margin."),
])  # fmt: skip
def test_the_margin_is_judged_by_what_the_recipe_asks_for(run: RunFolder, asked, reached, ok, said) -> None:
    run.recipe().evaluation("knn", scores(student=50.0), margin={"asked": asked, "reached": reached, "ok": ok})
    assert said in section(page(run), "Results").text


def test_a_result_without_rows_is_shown_as_it_is(run: RunFolder) -> None:
    run.recipe().evaluation("retrieval", [], recall={"at_1": 0.5})
    assert '"at_1": 0.5' in section(page(run), "Results").text


def test_lineage_names_weights_checksums_data_code_and_packages(finished: RunFolder) -> None:
    found = section(page(finished), "Lineage")
    teacher = rows(found.all("table")[0])[1]
    assert teacher[:2] == ["wise", "vit_base_patch16_224"]
    assert f"{finished.root}/weights/wise.st" in teacher[2]
    assert f"{1:064x}" in teacher[2]
    assert teacher[3] == "licence of wise"
    for fact in ("c0ffee", "f" * 64, "train.lr=1", "torch 2.11"):
        assert fact in found.text


def test_a_commit_with_uncommitted_changes_is_called_so(run: RunFolder) -> None:
    run.recipe()
    run.store.put("record.json", b'{"commit": "c0ffee", "dirty": true}')
    assert "c0ffee with uncommitted changes" in section(page(run), "Lineage").text


def test_attempts_show_where_they_began_how_long_they_worked_and_why_they_ended(run: RunFolder) -> None:
    run.recipe().moves(
        ("created", 0, 0, {}),
        ("queued", 1, 1, {"launcher": "local"}),
        ("running", 1, 10, {"ranks": 2, "device": "cuda"}),
        ("preempted", 1, 70, {"reason": "node drained"}),
        ("queued", 2, 71, {}),
        ("running", 2, 80, {"host": "n7"}),
        ("succeeded", 2, 85, {}),
    )
    run.metrics(training_rows(30)).metrics(training_rows(20, first=20), attempt=2, start_step=20)
    found = page(run)
    first, second = rows(section(found, "Attempts").all("table")[0])
    assert first == ["1", "0", "1 min 00 s", "2027-01-15 08:00:10 UTC", "preempted", "2 x cuda, local", "node drained"]
    assert second == ["2", "20", "5 s", "2027-01-15 08:01:20 UTC", "succeeded", "n7", ""]
    assert tiles(found)["Attempts"] == "21 stopped early"
    assert tiles(found)["Wall time"].startswith("1 min 05 s")


def test_only_committed_checkpoints_are_listed(finished: RunFolder) -> None:
    finished.checkpoint(60, committed=False)
    table = section(page(finished), "Checkpoints").all("table")[0]
    assert [row[:3] for row in rows(table)] == [["20", "1 kB", "1"], ["40", "1 kB", "1"]]


def test_the_snippet_loads_the_exported_student(finished: RunFolder) -> None:
    [snippet] = section(page(finished), "Export").all("pre")
    lines = "".join(snippet.words).splitlines()
    assert len(lines) == 3
    assert lines[1] == "model = timm.create_model('vit_tiny', num_classes=0, img_size=32)"
    compile("\n".join(lines), "snippet", "exec")


def test_the_resolved_recipe_is_there_to_unfold(finished: RunFolder) -> None:
    [details] = section(page(finished), "Recipe").all("details")
    assert "".join(details.all("pre")[0].words) == finished.store.get("recipe.yaml").decode()


# ---- what is not there, or not right


def test_an_empty_run_folder_is_reported_without_an_error(run: RunFolder) -> None:
    text = page(run).text
    assert "no recipe in this run's folder" in text
    for verb in ("eval", "export", "logs", "report"):
        assert f"make {verb} RUN=toy-0123456789 STORE={run.root}" in text


def test_a_run_that_is_still_going_says_so_and_how_to_see_more(run: RunFolder) -> None:
    run.recipe().moves(("created", 0, 0, {}), ("queued", 1, 1, {}), ("running", 1, 10, {}))
    run.metrics(training_rows(10))
    run.store.put("heartbeat.json", b'{"time": 1800000090, "eta_s": 600, "loss": NaN}')
    found = page(run, after_s=100)
    [note] = found.all("div", "note")
    assert "as of 2027-01-15 08:01:40 UTC" in note.text
    assert "last sign of life 2027-01-15 08:01:30 UTC, 10 min 00 s left" in note.text
    assert f"make report RUN=toy-0123456789 STORE={run.root}" in note.text
    assert tiles(found)["Wall time"].startswith("1 min 30 s")
    assert "None yet. The recipe writes one every 1,000 steps" in section(found, "Checkpoints").text


def test_a_failed_run_shows_its_reason_and_the_next_commands(run: RunFolder) -> None:
    reason = "rank 1: exit code 1\nValueError: no such thing"
    run.recipe().moves(("created", 0, 0, {}), ("queued", 1, 1, {}), ("failed", 1, 5, {"reason": reason}))
    [note] = page(run).all("div", "note")
    assert "".join(note.all("pre")[0].words) == reason
    attempts = section(page(run), "Attempts")
    assert rows(attempts.all("table")[0])[0][-1] == "rank 1: exit code 1"
    assert "".join(attempts.all("pre")[0].words) == reason
    assert f"make resume RUN=toy-0123456789 STORE={run.root}" in note.text


def test_results_and_export_older_than_the_newest_checkpoint_are_marked(finished: RunFolder) -> None:
    finished.evaluation("knn", scores(student=50.0), time=1.0)
    found = section(page(finished), "Results")
    assert "Evaluated before the checkpoint of step 40 was written; again: make eval" in found.text
    assert "before the checkpoint" not in section(page(finished), "Export").text


def test_values_that_are_not_finite_are_counted_and_crossed(run: RunFolder) -> None:
    going = training_rows(20)
    going[5]["loss"] = math.nan
    going[6]["loss"] = math.inf
    run.recipe().metrics(going)
    found = section(page(run), "Training")
    assert "Not finite, and marked by crosses (rows): loss (2)." in found.text
    loss = found.all("figure")[0]
    assert loss.all("path", "broken")[0].attributes["d"].count("M") == 2


HOSTILE = "</pre></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;\x1b[31m\x00"


def test_text_from_the_store_never_becomes_markup(run: RunFolder) -> None:
    run.recipe(name=HOSTILE, teachers=(HOSTILE, "big"))
    log = f"{HOSTILE}\n{HOSTILE}"
    run.moves(("created", 0, 0, {}), ("queued", 1, 1, {"host": HOSTILE}), ("failed", 1, 5, {"reason": log}))
    going = training_rows(5, [HOSTILE], stage="one") + training_rows(5, [HOSTILE], stage=HOSTILE, first=5)
    run.metrics([{**row, HOSTILE: float(row["step"])} for row in going])
    hostile_row = {"model": f"student {HOSTILE}", "top1": 1.0, HOSTILE: HOSTILE}
    run.evaluation("knn", [hostile_row], settings={HOSTILE: HOSTILE, "classes": [HOSTILE]})
    run.exported(model_name=HOSTILE, **{HOSTILE: HOSTILE})
    run.store.put("record.json", json.dumps({"commit": HOSTILE, "packages": {HOSTILE: HOSTILE}}).encode())
    text = report.render(gather(run.store, run.root, START))
    found = read(text)
    assert found.all("script") == []
    assert found.all("img") == []
    assert len(found.all("style")) == 1
    assert "\x1b" not in text
    assert "\x00" not in text
    shown = "</pre></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;"
    assert found.all("h1")[0].text == shown
    assert found.text.count(shown) > 20
