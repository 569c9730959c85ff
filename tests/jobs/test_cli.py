"""The command line: what it imports, what it takes, and which exit code says what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import ConfigError
from core.storage import StoreError
from jobs import cli
from jobs.errors import NotReady, UserError, describe, exit_code, nearest, redact
from jobs.settings import Settings, collect
from jobs.spec import REPOSITORY

HEAVY = ("torch", "timm", "omegaconf", "boto3", "botocore", "deepspeed", "huggingface_hub", "tqdm")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["nonsense"], ["gc"], ["image"]])
def test_help_and_refusals_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from jobs.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
assert not [name for name in {HEAVY!r} if name in sys.modules], sorted(sys.modules)
"""
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "recipes"])
def test_looking_at_runs_loads_no_torch(verb: str, root: str) -> None:
    code = "import sys; from jobs.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    store = [] if verb == "recipes" else ["--store", root]
    assert python(code, verb, *(["demo-1"] if verb in ("logs", "cancel") else []), *store).returncode == 0


def test_help_names_every_verb_and_the_exit_codes() -> None:
    text = python("import sys; from jobs.cli import main; main(['--help'])").stdout
    assert all(verb in text for verb in cli.VERBS)
    assert "75 preempted" in " ".join(text.split())


def test_every_verb_leads_to_a_function() -> None:
    assert all(callable(verb.load()) for verb in cli.VERBS.values())


def test_a_verb_says_in_one_line_what_it_cannot_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["features"]) == 2
    error = capsys.readouterr().err
    assert "RECIPE is not set" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("form", ["hf", "onnx", "timm,onnx"])
def test_export_formats_that_are_not_built_say_so(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "demo-1", "--format", form]) == 2
    assert "not built yet" in capsys.readouterr().err


def test_an_unknown_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sumbit"]) == 2
    assert "did you mean submit" in capsys.readouterr().err


def test_a_missing_run_or_recipe_is_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cancel"]) == 2
    assert "RUN is not set" in capsys.readouterr().err
    assert cli.main(["submit"]) == 2
    assert "RECIPE is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x"), 2), (ConfigError("x"), 2), (NotReady("x"), 3), (StoreError("x"), 3),
                        (ModuleNotFoundError("x", name="timm"), 3), (ModuleNotFoundError("x", name="core.y"), None),
                        (KeyError("x"), None)],
)  # fmt: skip
def test_errors_have_their_exit_codes(error: Exception, code: int | None) -> None:
    assert exit_code(error) == code


def test_a_traceback_is_for_bugs_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(settings: Settings) -> int:
        raise ZeroDivisionError(f"with {os.environ['AWS_SECRET_ACCESS_KEY']}")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    monkeypatch.setattr("jobs.verbs.gc.gc", broken)
    assert cli.main(["gc"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "a bug in Retort" in error
    assert "very-secret-value" not in error


def test_expected_errors_are_one_line_each() -> None:
    assert describe(UserError("no such thing")) == "error: no such thing"
    assert "make setup" in describe(ModuleNotFoundError("x", name="timm"))


def test_credentials_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh")
    monkeypatch.setenv("MY_TOKEN", "x")  # too short to be one; it would blot out everything
    shown = redact("key abcdefgh at https://me:pa55@host/x and file:///x")
    assert shown == "key *** at https://***@host/x and file:///x"


def test_nothing_near_means_no_hint() -> None:
    assert nearest("zzz", ["submit"]) == ""


def settings(*arguments: str, **environment: str) -> Settings:
    return collect(cli.parser().parse_args(list(arguments)), environment)


def test_options_come_from_variables_and_arguments_win() -> None:
    variables = {"RECIPE": "other", "PROFILE": "x", "LAUNCHER": "local", "DRY": "1", "DETACH": ""}
    both = settings("submit", "demo", "--profile", "smoke", **variables)
    assert (both.recipe, both.profile, both.launcher, both.dry, both.detach) == ("demo", "smoke", "local", True, False)
    assert settings("logs", RUN="demo-1", TAIL="7").tail == 7


def test_overrides_are_split_like_a_shell_does() -> None:
    chosen = settings("submit", "--set", "a.b='c d' e=f", "--set", "g=h", SET='i="$(j) ;k"')
    assert chosen.set == ("i=$(j) ;k", "a.b=c d", "e=f", "g=h")


@pytest.mark.parametrize("environment", [{"SET": "a='b"}, {"DRY": "perhaps"}, {"TAIL": "many"}])
def test_values_that_cannot_be_read_name_their_variable(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(environment))):
        settings("logs", **environment)


@pytest.mark.parametrize("name", ["STORE", "RUN", "SRC", "TAG", "CLUSTER", "AFTER"])
def test_options_are_one_line_of_text(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: must be one line"):
        settings("status", **{name: "x\ny"})


def test_words_may_be_set_out_over_lines_and_a_note_may_have_some() -> None:
    found = settings("submit", SET="a.b=c\n\td=e", SWEEP="a=1\nb=2", LICENCE="one\ntwo")
    assert (found.set, found.sweep, found.licence) == (("a.b=c", "d=e"), "a=1\nb=2", "one\ntwo")
    with pytest.raises(UserError, match="LICENCE"):
        settings("shards", LICENCE="\x1b[2J")


def test_the_store_is_the_nearest_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from core.recipe import Recipe

    with_store = Recipe(store="s3://recipe/x")
    assert Settings().root() == f"file://{tmp_path}/.retort/store"
    monkeypatch.setenv("RETORT_STORE", "s3://variable/x/")
    assert Settings().root() == "s3://variable/x"
    assert Settings().root(with_store) == "s3://recipe/x"
    assert Settings(store="s3://option/x").root(with_store) == "s3://option/x"
    assert Settings(store="s3://option/x", set=("store=s3://recipe/x",)).root(with_store) == "s3://recipe/x"


@pytest.mark.parametrize("uri", ["bucket/x", "s3:/x", "s3://", "file://relative", "http://x"])
def test_what_is_no_store_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        Settings(store=uri).root()


def test_a_store_is_one_line_wherever_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_STORE", "s3://b/x\necho")
    with pytest.raises(UserError, match="store: must be one line"):
        Settings().root()


def test_recipes_are_listed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert "make submit RECIPE=NAME" in capsys.readouterr().out
    assert cli.main(["recipes", "--json"]) == 0
    demo = next(row for row in json.loads(capsys.readouterr().out) if row["recipe"] == "demo")
    assert demo["method"] == "unic"
    assert len(demo["teachers"]) == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), "error: memory is used up: lower "), (OSError(24, "Too many"), "error: the limit of open files"),
     (OSError(28, "No space left on device", "/dev/shm/x"), "error: /dev/shm is used up"),
     (NotReady("no memory"), "error: no memory")],
)  # fmt: skip
def test_what_the_machine_lacks_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def short(settings: object) -> int:
        raise error

    monkeypatch.setattr(cli.Verb, "load", lambda verb: short)
    assert cli.main(["status"]) == 3
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert "Traceback" not in said
