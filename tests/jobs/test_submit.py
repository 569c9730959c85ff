"""submit and resume: what happens before a run is queued, and what never happens twice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from core.config import fingerprint, from_yaml, to_yaml
from core.numerics import CURRENT
from core.storage import open_store
from jobs import cli, spec
from jobs.errors import UserError
from jobs.launchers import local
from jobs.record import Run, State
from jobs.spec import Code
from tests.jobs.conftest import end_supervisor, fake_worker

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], root: str) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main([*arguments, "--store", root])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def ranks_do(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the ranks of runs submitted from here on do."""
    monkeypatch.setattr(local.LAUNCHER, "preload", ())
    return lambda deed: monkeypatch.setattr(local.LAUNCHER, "worker", fake_worker(deed))


def run_of(out: str) -> str:
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(r"run: tiny-[0-9a-f]{10}(-\d+)?", last), out
    return last.removeprefix("run: ")


def test_a_run_is_recorded_followed_and_named_on_the_last_line(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("ok")
    code, out, _ = command("submit", str(tiny_recipe), "--set", "log.every_steps=3 launch.max_attempts=2")
    assert code == 0
    run = Run(root, run_of(out))
    record = run.record()
    assert record["recipe"] == "tiny"
    assert record["id"] == run.id
    assert record["fingerprint"].startswith(run.id.removeprefix("tiny-"))
    assert record["dotlist"] == ["log.every_steps=3", "launch.max_attempts=2"]
    assert record["teachers"] == {"big": {"weights": "random", "sha256": "", "licence": "unknown"}}
    assert {"torch", "timm"} <= set(record["packages"])
    assert {"commit", "dirty", "created", "profile"} <= set(record)
    assert run.recipe().log.every_steps == 3
    assert run.recipe().method.options["hidden"] == 32


def test_the_same_recipe_again_is_already_done(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("ok")
    _, first, _ = command("submit", str(tiny_recipe))
    code, second, _ = command("submit", str(tiny_recipe))
    assert code == 0
    assert "already done" in second
    assert "FRESH=1" in second
    assert run_of(second) == run_of(first)
    assert len(Run.list(root)) == 1


def test_fresh_makes_a_further_run(command: Command, tiny_recipe: Path, ranks_do: Callable[[str], None]) -> None:
    ranks_do("ok")
    _, first, _ = command("submit", str(tiny_recipe))
    for number in (2, 3):
        _, again, _ = command("submit", str(tiny_recipe), "--fresh")
        assert run_of(again) == f"{run_of(first)}-{number}"


def test_a_running_run_is_left_alone(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wait")
    code, out, _ = command("submit", str(tiny_recipe), "--detach")
    assert code == 0
    run = Run(root, run_of(out))
    try:
        code, out, _ = command("submit", str(tiny_recipe))
        assert code == 0
        assert re.search("already (queued|running)", out)
        assert run_of(out) == run.id
        assert command("resume", run.id)[0] == 2
        assert run.last().attempt == 1
    finally:
        end_supervisor(run)


def test_a_failed_run_is_resumed_by_submitting_again_with_the_settings_of_now(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("killed")
    code, out, _ = command("submit", str(tiny_recipe))
    assert code == 1
    assert "killed by SIGKILL" in out
    run = Run(root, run_of(out))
    assert run.last().state == State.FAILED
    ranks_do("ok")
    code, out, _ = command("submit", str(tiny_recipe), "--set", "launch.ranks=1")
    assert (code, run_of(out)) == (0, run.id)
    assert run.last().attempt == 2
    assert run.recipe().launch.ranks == 1


def test_a_preempted_run_ends_with_75_and_resume_takes_it_up(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("preempted_once")
    code, out, _ = command("submit", str(tiny_recipe))
    assert code == 75
    run = Run(root, run_of(out))
    code, out, _ = command("resume", run.id, "--set", "launch.ranks=1 zero.stage=2")
    assert (code, run_of(out)) == (0, run.id)
    assert (run.last().state, run.last().attempt) == (State.SUCCEEDED, 2)
    assert (run.recipe().launch.ranks, run.recipe().zero.stage) == (1, 2)
    code, _, error = command("resume", run.id)
    assert code == 2
    assert "has succeeded" in error


def environment_of(run: Run, attempt: int) -> dict[str, str]:
    """What a rank that did `environment` has seen."""
    found: dict[str, str] = json.loads(Path(f".retort/logs/{run.id}/attempt-{attempt:04d}/rank-0000.log").read_text())
    return found


def test_folders_of_this_machine_reach_the_ranks_and_not_the_store(
    command: Command, tiny_recipe: Path, root: str, tmp_path: Path, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("environment")
    folders = f"loader.cache_dir={tmp_path}/nvme-cache checkpoint.spool={tmp_path}/nvme-spool"
    code, out, _ = command("submit", str(tiny_recipe), "--set", folders)
    assert code == 0
    run = Run(root, run_of(out))
    seen = environment_of(run, 1)
    assert (seen["RETORT_CACHE"], seen["RETORT_SPOOL"]) == (f"{tmp_path}/nvme-cache", f"{tmp_path}/nvme-spool")
    assert b"nvme" not in run.store.get("recipe.yaml")


def test_resume_takes_folders_from_the_command_and_never_from_the_store(
    command: Command, tiny_recipe: Path, root: str, tmp_path: Path, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("killed")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    stored = yaml.safe_load(run.store.get("recipe.yaml"))
    stored["loader"]["cache_dir"] = stored["checkpoint"]["spool"] = f"{tmp_path}/photos"
    run.write_recipe(yaml.safe_dump(stored))
    ranks_do("environment")
    assert command("resume", run.id, "--set", f"checkpoint.spool={tmp_path}/own")[0] == 0
    seen = environment_of(run, 2)
    assert (seen.get("RETORT_CACHE"), seen["RETORT_SPOOL"]) == (None, f"{tmp_path}/own")
    assert b"/photos" not in run.store.get("recipe.yaml").split(b"data:")[0]
    assert (run.recipe().loader.cache_dir, run.recipe().checkpoint.spool) == ("", "")


def test_what_follows_a_run_and_an_evaluation_keep_shards_where_their_command_says(
    command: Command, tiny_recipe: Path, root: str, tmp_path: Path, ranks_do: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from core.evaluate import run as evaluation

    seen: list[str | None] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: seen.append(os.environ.get("RETORT_CACHE")) or {})
    ranks_do("ok")
    code, out, _ = command("submit", str(tiny_recipe), "--after", "eval", "--set", f"loader.cache_dir={tmp_path}/first")
    assert code == 0
    assert command("eval", run_of(out))[0] == 0
    assert command("eval", run_of(out), "--set", f"loader.cache_dir={tmp_path}/second")[0] == 0
    assert seen == [f"{tmp_path}/first", None, f"{tmp_path}/second"]


def test_a_folder_that_is_no_shard_cache_is_refused_before_anything_is_queued(
    command: Command, tiny_recipe: Path, photos: Path, root: str, ranks_do: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ranks_do("ok")
    code, _, error = command("submit", str(tiny_recipe), "--set", f"loader.cache_dir={photos}")
    assert (code, Run.list(root)) == (3, [])
    assert f"shard cache {photos}: it holds what is not Retort's, such as cats: name an empty or a new folder" in error
    monkeypatch.setenv("RETORT_CACHE", str(photos))
    assert command("submit", str(tiny_recipe))[0] == 3
    assert len(list(photos.rglob("*.jpg"))) == 4


def test_a_lost_run_is_taken_up_again(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wait")
    _, out, _ = command("submit", str(tiny_recipe), "--detach")
    run = Run(root, run_of(out))
    end_supervisor(run)
    limit = time.monotonic() + 20
    while not run.view().lost:
        assert time.monotonic() < limit
        time.sleep(0.05)
    ranks_do("ok")
    assert command("submit", str(tiny_recipe))[0] == 0
    assert [t.info["reason"][:4] for t in run.transitions() if t.state == State.PREEMPTED] == ["lost"]


def test_a_run_whose_input_its_ranks_refuse_ends_with_their_code(
    command: Command, tiny_recipe: Path, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wrong_input")
    assert command("submit", str(tiny_recipe))[0] == 2


def test_resume_refuses_what_would_be_another_run(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wrong_input")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    code, _, error = command("resume", run.id, "--set", "train.lr=1")
    assert code == 2
    assert "another run" in error
    assert run.last().attempt == 1


def test_resume_names_every_difference_and_says_how_to_go_on_all_the_same(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wrong_input")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    print_before = fingerprint(run.recipe())
    content = yaml.safe_load(tiny_recipe.read_text())
    content["train"] |= {"lr": 0.5}
    content["log"] = {"every_steps": 7}
    tiny_recipe.write_text(yaml.safe_dump(content))
    code, _, error = command("resume", run.id, "--recipe", str(tiny_recipe))
    assert code == 2
    assert "train.lr: 0.0003 -> 0.5" in error
    assert "log.every_steps: 50 -> 7" in error
    assert "FORCE=1" in error
    ranks_do("ok")
    code, out, _ = command("resume", run.id, "--recipe", str(tiny_recipe), "--force")
    assert (code, run_of(out)) == (0, run.id)
    assert "changed: train.lr: 0.0003 -> 0.5" in out
    assert run.recipe().train.lr == 0.5
    assert run.recipe().checkpoint.accept == [print_before], "its checkpoints are taken up"
    assert "train.lr: 0.0003 -> 0.5" in run.handle(run.last())["changed"]


def test_a_run_that_retort_now_computes_otherwise_goes_on_only_by_force(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("fail")
    run = Run(root, run_of(command("submit", str(tiny_recipe), "--set", "train.warmup_epochs=1.5")[1]))
    begun = dataclasses.replace(run.recipe(), numerics=0)
    run.write_recipe(to_yaml(begun))
    code, _, error = command("resume", run.id)
    assert code == 2
    assert "Retort since 2026-12-01: a warm-up of parts of an epoch is rounded down" in error
    assert "FORCE=1" in error
    ranks_do("ok")
    assert command("resume", run.id, "--force")[0] == 0
    assert run.recipe().numerics == CURRENT
    assert run.recipe().checkpoint.accept == [fingerprint(begun)]


def test_a_run_on_which_no_change_bears_goes_on_as_it_is(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("fail")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    run.write_recipe(to_yaml(dataclasses.replace(run.recipe(), numerics=0)))
    ranks_do("ok")
    code, out, _ = command("resume", run.id)
    assert (code, "changed:" in out) == (0, False)


def test_submit_does_not_undo_what_a_forced_resume_has_changed(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("fail")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    command("resume", run.id, "--set", "train.lr=0.5", "--force")
    code, _, error = command("submit", str(tiny_recipe))
    assert code == 2
    assert f"make resume RUN={run.id}" in error


def test_resume_goes_on_with_another_number_of_ranks_and_names_those_that_are_possible(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("wrong_input")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    code, _, error = command("resume", run.id, "--nproc", "3")
    assert code == 2
    assert "allowed: 1, 2" in error
    ranks_do("ok")
    assert command("resume", run.id, "--nproc", "1")[0] == 0
    assert run.recipe().launch.ranks == 1


@pytest.mark.parametrize("words", [("submit",), ("submit", "--dry"), ("doctor",)])
def test_an_evaluation_that_could_not_be_is_refused_before_anything_is_queued(
    command: Command, tiny_recipe: Path, photos: Path, root: str, words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("jobs.doctor.collective", lambda recipe: "not under test")
    flat = photos.parent / "flat"
    flat.mkdir()
    (flat / "1.jpg").write_bytes(next(photos.rglob("*.jpg")).read_bytes())
    given = [f"evaluate.train=file://{photos}", f"evaluate.test=file://{flat}"]
    code, out, error = command(words[0], str(tiny_recipe), *words[1:], *(w for item in given for w in ("--set", item)))
    assert code in (2, 3)
    assert "flat has no labels: its 1 images lie in no class folder" in out + error
    assert not list(open_store(root).list("runs/"))


def test_a_dry_run_prints_recipe_and_plan_and_submits_nothing(command: Command, tiny_recipe: Path, root: str) -> None:
    code, out, error = command("submit", str(tiny_recipe), "--dry", "--set", "train.lr=0.125")
    assert code == 0, error
    run_of(out)
    shown = out[: out.index("\n\n")]
    assert from_yaml(shown).train.lr == 0.125
    assert "nothing was submitted" in out
    assert list(open_store(root).list()) == []


def test_all_that_is_missing_is_named_at_once(
    command: Command, tiny_recipe: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    vit = recipe["teachers"]["big"]
    recipe["teachers"] = {
        "hub": {**vit, "weights": "hub"}, "other": {**vit, "weights": "hub:someone/model"},
        "bytes": {**vit, "weights": "store:weights/x.safetensors"}, "run": {**vit, "weights": "run:demo-1"},
    }  # fmt: skip
    recipe["student"]["weights"] = f"file://{tmp_path}/nothing.safetensors"
    recipe["data"] = {"heldout": f"file://{tmp_path}/nowhere"}
    recipe["evaluate"] = {"train": "store:probes/train"}
    recipe["launch"] = {"device": "cuda", "ranks": 2}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    code, out, error = command("submit", str(tiny_recipe))
    assert code == 3
    assert "9 things are missing" in error
    for what in (
        "cuda needs 2 GPUs", "data.source is not set", "data.heldout: there is no folder",
        "evaluate.train: there is no", "teachers.hub.weights: the weights timm/vit_tiny_patch16_224", "HF_HUB_OFFLINE",
        "teachers.other.weights", "teachers.bytes.weights: there is no file", "student.weights",
        "teachers.run.weights: run demo-1 is not in",
    ):  # fmt: skip
        assert what in error
    for how in ("make shards", 'SET="data.source=', "hf download someone/model", "s3://", "PROFILE=smoke"):
        assert how in error
    assert Run.list(root) == []


def test_a_store_that_cannot_be_written_is_named_among_the_rest(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    tiny_recipe.write_text(tiny_recipe.read_text().replace("source: ", "heldout: "))
    code = cli.main(["submit", str(tiny_recipe), "--store", f"file://{tmp_path}/file"])
    error = capsys.readouterr().err
    assert code == 3
    assert "store: " in error
    assert "data.source is not set" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stepz=1", "train.steps"),
        ("zero.stage=7", "zero.stage"),
        ("launch.ranks=3", "allowed: 1, 2"),
        ("method.options.hiden=1", "hidden"),
        ("student.name=vit_tny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("train.img_size=36", "patches of 8 pixels"),
        ("train.precision=bf16 zero.stage=0", "zero.stage=1"),
        ("train.batch=8 train.micro_batch=4 launch.ranks=1", "4 images"),
    ],
)
def test_wrong_settings_are_user_errors(
    command: Command, tiny_recipe: Path, root: str, change: str, words: str
) -> None:
    code, out, error = command("submit", str(tiny_recipe), "--set", change)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert Run.list(root) == []


def test_status_and_logs_tell_what_happened(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    assert "no runs" in command("status")[1]
    ranks_do("fail")
    monitored = run_of(command("submit", str(tiny_recipe))[1])
    table = command("status")[1]
    assert monitored in table
    assert "failed" in table
    detail = command("status", monitored)[1]
    assert "ValueError: broken" in detail
    assert f"make resume RUN={monitored}" in detail
    facts = json.loads(command("status", monitored, "--json")[1])
    assert facts["state"] == "failed"
    assert [t["state"] for t in facts["transitions"]] == ["created", "queued", "running", "failed"]
    assert json.loads(command("status", "--json")[1])[0]["run"] == monitored
    shown = command("logs", monitored, "--tail", "1")[1]
    assert "rank-0001.log" in shown
    assert "ValueError: broken" in shown


def test_logs_that_are_not_stored_yet_are_read_where_they_are(
    command: Command, tiny_recipe: Path, root: str, ranks_do: Callable[[str], None]
) -> None:
    ranks_do("fail")
    run = Run(root, run_of(command("submit", str(tiny_recipe))[1]))
    run.store.delete("logs/attempt-0001/rank-0001.log")
    assert "ValueError: broken" in command("logs", run.id)[1]


def test_a_run_id_depends_on_the_result_alone(tiny_recipe: Path) -> None:
    from core.config import load
    from core.registry import complete

    def named(*dotlist: str) -> str:
        return spec.run_id(complete(load(str(tiny_recipe), "", list(dotlist))))

    assert re.fullmatch(r"tiny-[0-9a-f]{10}", named())
    assert named("launch.ranks=1", "zero.stage=3", "log.every_steps=2", "store=s3://b/x") == named()
    assert named("train.lr=0.5") != named()


def test_a_dirty_tree_is_refused_where_it_is_not_seen() -> None:
    spec.require_clean(Code("abc", False), allow_dirty=False)
    spec.require_clean(Code("abc", True), allow_dirty=True)
    with pytest.raises(UserError, match="DIRTY=1"):
        spec.require_clean(Code("abc", True), allow_dirty=False)


def test_the_commit_is_read_from_git_and_unknown_without(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    assert spec.code(tmp_path / "none") == Code("unknown", False)
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    clean = spec.code(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean.commit)
    assert not clean.dirty
    (tmp_path / "a").write_text("2")
    assert spec.code(tmp_path) == Code(clean.commit, True)
