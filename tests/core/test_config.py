from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import config
from core.config import ConfigError, fingerprint, from_yaml, load, to_yaml
from core.merge import flatten
from core.recipe import Recipe, Teacher
from core.registry import complete, create

LEAST = "method: {name: unic}\nteachers: {one: {name: vit_tiny_patch16_224}}\n"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a recipe file of the least content and more; returns its path."""

    def make(more: str = "", name: str = "mine.yaml", least: str = LEAST) -> str:
        (tmp_path / name).write_text(least + more)
        return str(tmp_path / name)

    return make


def refusal(*args: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(*args)
    return str(error.value)


# ---- what wins


def test_dotlist_beats_profile_beats_recipe_beats_base_beats_defaults(write: Write) -> None:
    write(
        "train: {lr: 1.0, clip: 1.0, eps: 1.0, min_lr: 1.0}\nprofiles: {fast: {train: {eps: 3.0, lr: 3.0}}}\n", "b.yaml"
    )
    more = "base: b.yaml\ntrain: {clip: 2.0, eps: 2.0, lr: 2.0}\nprofiles: {fast: {train: {lr: 4.0}}}\n"
    train = load(write(more, "a.yaml", ""), "fast", ["train.lr=5"]).train
    assert (train.weight_decay, train.min_lr, train.clip, train.eps, train.lr) == (0.03, 1.0, 2.0, 3.0, 5.0)


def test_a_recipe_s_own_profile_beats_the_profile_that_all_recipes_share(write: Write) -> None:
    path = write("profiles: {smoke: {train: {steps: 3}}}\n")
    assert load(path, "smoke").train.steps == 3
    assert load(path, "smoke").train.batch == 16
    assert load(path).train.steps == 0


def test_groups_with_free_keys_are_merged_key_by_key(write: Write) -> None:
    path = write("student: {args: {depth: 2, num_heads: 4}}\n")
    recipe = load(path, "", ["student.args.depth=3", "teachers.two.name=vit_small_patch16_224"])
    assert recipe.student.args == {"depth": 3, "num_heads": 4}
    assert {key: t.name for key, t in recipe.teachers.items()} == {
        "one": "vit_tiny_patch16_224",
        "two": "vit_small_patch16_224",
    }


def test_a_stage_overlays_the_train_group_and_keeps_its_place(write: Write) -> None:
    recipe = load(write("train: {lr: 1e-3, clip: 2}\nstages:\n  z: {img_size: 32}\n  a: {lr: 1e-4, steps: 7}\n"))
    assert recipe.stage_names() == ["z", "a"]
    first, second = recipe.stage("z"), recipe.stage("a")
    assert (first.img_size, first.lr, first.steps, first.clip) == (32, 1e-3, 0, 2.0)
    assert (second.img_size, second.lr, second.steps, second.clip) == (224, 1e-4, 7, 2.0)


def test_a_stage_may_have_a_student_data_and_a_method_of_its_own(write: Write) -> None:
    recipe = load(
        write("""
student: {args: {depth: 2, num_heads: 4}}
stages:
  a: {}
  b: {student: {args: {depth: 3}, drop_path: 0.1}, data: {share: 0.5}, method: {options: {drop: 0.0}}}
  c: {method: {name: finetune}, student: {name: proteus-s}}
""")
    )
    first, second, third = (recipe.at(name) for name in "abc")
    assert first == recipe
    assert (second.student.args, second.student.drop_path) == ({"depth": 3, "num_heads": 4}, 0.1)
    assert (second.data.share, second.method.options) == (0.5, {"drop": 0.0})
    assert (third.method.name, third.method.options) == ("finetune", {})
    assert (third.student.name, third.student.weights) == ("vit_small_patch14_dinov2", "store:weights/proteus_s.pth")
    assert fingerprint(recipe) != fingerprint(load(write("stages: {a: {}, b: {}, c: {}}\n")))


def test_what_is_wrong_within_a_stage_is_told_with_its_place(write: Write) -> None:
    assert "unknown field stages.a.data.shar; did you mean" in refusal(write("stages: {a: {data: {shar: 1}}}\n"))
    assert "stages.a.data.share: must be at most 1, got 2" in refusal(write("stages: {a: {data: {share: 2}}}\n"))
    assert "stages.a.student.drop_path: must be below 1" in refusal(write("stages: {a: {student: {drop_path: 1}}}\n"))


def test_a_recipe_without_stages_has_one_that_is_the_train_group(write: Write) -> None:
    recipe = load(write())
    assert recipe.stage_names() == ["main"]
    assert recipe.stage("main") == recipe.train


@pytest.mark.parametrize(
    ("item", "group", "field", "value"),
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),
        ("train.betas=[0.8,0.95]", "train", "betas", (0.8, 0.95)),
        ("data.source=s3://bucket/a b", "data", "source", "s3://bucket/a b"),
        ("data.source=", "data", "source", ""),
        ("student.weights=007", "student", "weights", "7"),
        ("data={block: 4}", "data", "block", 4),
    ],
)
def test_values_of_overrides_are_yaml(write: Write, item: str, group: str, field: str, value: object) -> None:
    found = getattr(getattr(load(write(), "", [item]), group), field)
    assert (tuple(found) if isinstance(value, tuple) else found) == value


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "line", "hint"),
    [
        ("train:\n  lr: 1\n  stesp: 4\n", 5, "unknown field train.stesp; did you mean train.steps?"),
        ("trian: {lr: 1}\n", 3, "unknown field trian; did you mean train?"),
        ("micro_batch: 3\n", 3, "unknown field micro_batch; did you mean train.micro_batch?"),
        ("data:\n  sorce: x\n", 4, "unknown field data.sorce; did you mean data.source?"),
        ("stages:\n  big:\n    img_sze: 3\n", 5, "unknown field stages.big.img_sze; did you mean stages.big.img_size?"),
        ("train:\n  steps: many\n", 4, "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train:\n  lr: true\n", 4, "train.lr: Value 'True' of type 'bool' could not be converted to Float"),
        ("train:\n  steps: 1.5\n", 4, "train.steps: "),
        ("train:\n  lr:\n", 4, "train.lr: "),
        ("train: 5\n", 3, "train: "),
        ("train:\n  betas: [0.9]\n", 4, "train.betas: "),
        ("stages:\n  big: {lr: fast}\n", 4, "stages.big.lr: "),
        ("stages: [a, b]\n", 3, "stages: "),
        ("data: {block: 2}\nzero: {stage: 1}\ndata: {block: 3}\n", 5, "data is given twice, first in line 3"),
        ("student:\n  args: {x: 2020-01-01}\n", 4, "student.args.x: "),
        ("profiles: [fast]\n", 3, "profiles must be a mapping of fields"),
        ("a: [\n", 4, "not valid YAML"),
        ("about: {paper: !!python/object/apply:os.getcwd []}\n", 3, "not valid YAML"),
    ],
)
def test_a_wrong_line_of_a_file_is_named_with_field_and_reason(write: Write, more: str, line: int, hint: str) -> None:
    path = write(more)
    message = refusal(path, "smoke") if "profiles" in more else refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert hint in message


def test_a_teacher_s_unknown_field_is_named(write: Write) -> None:
    path = write(least="method: {name: unic}\nteachers:\n  one:\n    nam: x\n")
    assert refusal(path) == f"{path}:4: unknown field teachers.one.nam; did you mean teachers.one.name?"


def test_a_wrong_line_of_a_profile_is_found_inside_of_the_profile(write: Write) -> None:
    path = write("train: {steps: 4}\nprofiles:\n  fast:\n    train: {stesp: 3}\n")
    assert refusal(path, "fast") == f"{path}:6: unknown field train.stesp; did you mean train.steps?"


def test_a_wrong_line_of_a_base_recipe_names_the_base(write: Write) -> None:
    base = write("train: {stesp: 4}\n", "base.yaml")
    assert refusal(write("base: base.yaml\n", least="")).startswith(f"{base}:3: ")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.stesp=4", "SET: unknown field train.stesp; did you mean train.steps?"),
        ("train.steps", "SET: 'train.steps' is not of the form key=value"),
        ("train..steps=3", "is not of the form key=value"),
        ("train.steps=[", "is not a valid YAML value"),
        ("train.steps=null", "SET: train.steps: "),
        ("train.precision=fp16", "train.precision: 'fp16' is not one of bf16, fp32; did you mean bf16?"),
        ("zero.stage=4", "zero.stage: 4 is not one of 0, 1, 2, 3"),
        (
            "teachers.one.cls=tokens",
            "teachers.one.cls: 'tokens' is not one of token, pooled, projected; did you mean token?",
        ),
        ("data.pixels=quick", "data.pixels: 'quick' is not one of exact, fast"),
        ("launch.device=gpu", "launch.device: 'gpu' is not one of auto, cpu, cuda"),
        ("train.lr=nan", "train.lr: nan is not a finite number"),
        ("train.betas=[0.9, .nan]", "train.betas: nan is not a finite number"),
        ("train.betas=[0.9, 1.0]", "train.betas: must be below 1"),
        ("stages.big.lr=.inf", "stages.big.lr: inf is not a finite number"),
        ("train.img_size=0", "train.img_size: must be above 0"),
        ("train.lr=-1", "train.lr: must not be negative"),
        ("train.max_bad_losses=0", "train.max_bad_losses: must be above 0"),
        ("student.drop_path=1.0", "student.drop_path: must be below 1"),
        ("checkpoint.pending=0", "checkpoint.pending: must be above 0"),
        ("checkpoint.keep=0", "checkpoint.keep: must be above 0"),
        *[
            (f"{key}=-1", f"{key}: must not be negative")
            for key in (
                "train.explode",
                "train.rewinds",
                "launch.backoff_s",
                "launch.deadline_h",
                "launch.time_limit_min",
                "launch.grace_s",
                "launch.hang_s",
                "checkpoint.keep_every",
                "checkpoint.keep_best",
                "checkpoint.patience_s",
            )
        ],
        ("train.batch=100", "train.batch: 100 is not a multiple of micro_batch 128"),
        ("stages.big.batch=100", "stages.big.batch: 100 is not a multiple of micro_batch 128"),
        ("train.epochs=0", "neither steps nor epochs is set"),
        ("schema=2", "schema: this Retort reads recipes of schema 1, not 2"),
        ("method.name=", "method.name: not set"),
        ("name=../elsewhere", "name: '../elsewhere' must be made of"),
        ("data.source=${nothing}", "data.source: ${...} in '${nothing}'"),
    ],
)
def test_a_wrong_override_is_refused(write: Write, item: str, message: str) -> None:
    assert message in refusal(write(), "", [item])


def test_off_is_a_word_and_false_a_truth_value(write: Write) -> None:
    assert load(write("features: off\nlog: {tensorboard: false}\n")).features == "off"
    assert load(write(), "", ["features=off"]).features == "off"
    assert not load(write("log: {tensorboard: false}\n")).log.tensorboard
    assert "log.tensorboard" in refusal(write("log: {tensorboard: nope}\n"))


def test_fewer_ranks_to_begin_with_cannot_be_more_than_all(write: Write) -> None:
    path = write("launch: {ranks: 2}\n")
    assert "launch.min_ranks: 3 is above launch.ranks, 2" in refusal(path, "", ["launch.min_ranks=3"])
    assert load(path, "", ["launch.min_ranks=2"]).launch.min_ranks == 2


def test_names_that_cannot_be_part_of_an_address_are_refused(write: Write) -> None:
    assert "teachers: the name 'a.b'" in refusal(write(least="method: {name: unic}\nteachers: {a.b: {name: x}}\n"))
    assert "stages: the name 'a/b'" in refusal(write("stages: {a/b: {steps: 3}}\n"))


def test_unknown_recipes_and_profiles_are_told_with_the_nearest_name(write: Write) -> None:
    assert "recipe 'dmeo' not found; did you mean demo?" in refusal("dmeo")
    assert "'../recipes/demo' not found" in refusal("../recipes/demo")
    assert "profile 'smoek' not found" in refusal(write(), "smoek")
    assert "did you mean smoke?" in refusal(write(), "smoek")
    assert "'../demo' not found" in refusal(write(), "../demo")


def test_base_recipes_in_a_circle_are_refused(write: Write) -> None:
    write("base: b.yaml\n", "a.yaml")
    assert "base recipes form a circle" in refusal(write("base: a.yaml\n", "b.yaml"))
    assert "base recipes form a circle" in refusal(write("base: self.yaml\n", "self.yaml"))


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"- a\n", b"\xff\xfe\x00"):
        (tmp_path / "x.yaml").write_bytes(content)
        assert str(tmp_path / "x.yaml") in refusal(str(tmp_path / "x.yaml"))


def test_yaml_cannot_run_code(write: Write, tmp_path: Path) -> None:
    path = write(f"data: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert "not valid YAML" in refusal(path)
    assert not (tmp_path / "made").exists()


INTERPOLATIONS = ("${oc.env:AWS_SECRET_ACCESS_KEY}", "${seed}", "a${oc.env:X,y}b", "${", "\\\\${x}")


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_nothing_is_filled_in_from_the_environment_or_from_other_fields(
    write: Write, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    quoted = json.dumps(text)
    places = {
        f"store: {quoted}\n": ":3: store: ${...}",
        f"about:\n  paper: {quoted}\n": ":4: about.paper: ${...}",
        f"data: {{merge: [{quoted}]}}\n": ":3: data.merge: ${...}",
        f"student: {{args: {{x: {quoted}}}}}\n": ":3: student.args.x: ${...}",
        f"student: {{args: {{{quoted}: 1}}}}\n": ":3: student.args: ${...}",
        f"stages: {{a: {{data: {{source: {quoted}}}}}}}\n": ":3: stages.a.data.source: ${...}",
        f"profiles: {{p: {{prepare: {quoted}}}}}\n": ":3: prepare: ${...}",
    }
    for more, words in places.items():
        path = write(more)
        told = refusal(path, "p" if "profiles" in more else "")
        assert told.startswith(f"{path}{words}")
        assert "very-secret-value" not in told
    told = refusal(write(), "", [f"store={quoted}"])
    assert told.startswith("SET: store: ${...}")
    assert "very-secret-value" not in told
    stored = to_yaml(load(write())).replace("prepare: ''", f"prepare: {quoted}")
    with pytest.raises(ConfigError, match=r"^runs/r/recipe\.yaml:\d+: prepare: "):
        from_yaml(stored, "runs/r/recipe.yaml")


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00", "\u2028", "\u202e"])
def test_a_value_is_one_line_of_text(write: Write, character: str) -> None:
    quoted = json.dumps(f"s3://b/x{character}echo")
    path = write(f"\nstore: {quoted}\n")
    assert refusal(path).startswith(f"{path}:4: store: must be one line")
    assert "SET: store: must be one line" in refusal(write(), "", [f"store={quoted}"])
    assert "evaluate.protocols: must be one line" in refusal(write(), "", [f"evaluate.protocols=[{quoted}]"])
    assert "method.options: must be one line" in refusal(write(), "", [f"method.options={{{quoted}: 1}}"])
    stored = to_yaml(load(write())).replace("store: ''", f"store: {quoted}")
    with pytest.raises(ConfigError, match="store: must be one line"):
        from_yaml(stored)


def test_what_a_recipe_says_of_itself_may_have_several_lines(write: Write) -> None:
    assert load(write("about:\n  paper: |\n    one\n    two\n")).about.paper == "one\ntwo\n"


@pytest.mark.parametrize("args", ["{checkpoint_path: /x}", "{pretrained_cfg: {file: /x}}", "{init_values: null}"])
def test_arguments_that_would_not_be_as_stated_are_refused_when_the_recipe_is_read(write: Write, args: str) -> None:
    name = args[1:].partition(":")[0]
    for more, place in (
        (f"student: {{args: {args}}}\n", "student"),
        (f"stages: {{a: {{student: {{args: {args}}}}}}}\n", "stages.a.student"),
    ):
        assert refusal(write(more)).startswith(f"{place}.args.{name}: ")
    assert refusal(write(), "", [f"teachers.one.args={args}"]).startswith(f"teachers.one.args.{name}: ")
    with pytest.raises(ConfigError, match=rf"^student.args.{name}: "):
        from_yaml(to_yaml(load(write())).replace("  args: {}", f"  args: {args}", 1))


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "words"),
    [(ALIASES, "too large for a file of settings: it stands for"), (MERGES, "too large"),
     ("- " * 100_000, "too deep"), ("data: " + "{a: " * 40 + "1" + "}" * 40, "too large"),
     ("# " + "x" * 2**18, "too large"), ("data: [" + "x, " * 20_000 + "x]", "stands for"),
     ("data: &a [*a]", "inside of its own anchor"), ("about: {published: 2024-13-45}", "not valid YAML: month must"),
     ("seed: " + "9" * 5000, "not valid YAML")],
)  # fmt: skip
def test_a_file_that_stands_for_too_much_is_refused_before_any_work(write: Write, text: str, words: str) -> None:
    began = time.monotonic()
    assert words in refusal(write(text, least=""))
    with pytest.raises(ConfigError, match=r"^runs/r/recipe\.yaml"):
        from_yaml(text, "runs/r/recipe.yaml")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", ["- " * 10_000, "[" * 40 + "]" * 40, "2024-13-45", "9" * 5000])
def test_so_is_a_value_of_an_override(write: Write, value: str) -> None:
    told = refusal(write(), "", [f"data.source={value}"])
    assert "is not a valid YAML value" in told
    assert len(told) < 500


# ---- identity


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "more": 1}
    return [changed(v) for v in value] if value else ["x"]


def variants(recipe: Recipe, group: str) -> list[Recipe]:
    """The recipe with one field of a group (or the group itself, if it has none) changed at a time."""
    own = getattr(recipe, group)
    if not dataclasses.is_dataclass(own):
        return [dataclasses.replace(recipe, **{group: changed(own)})]
    others = [dataclasses.replace(own, **{f.name: changed(getattr(own, f.name))}) for f in dataclasses.fields(own)]
    return [dataclasses.replace(recipe, **{group: other}) for other in others]


# "numerics" counts only where a change of Retort bears on the recipe: see test_numerics.
WITHOUT_EFFECT = {"store", "zero", "launch", "loader", "checkpoint", "log", "evaluate", "about", "numerics"}


@pytest.mark.parametrize("group", [f.name for f in dataclasses.fields(Recipe) if f.name not in ("teachers", "stages")])
def test_the_fingerprint_covers_all_that_the_result_depends_on_and_nothing_else(write: Write, group: str) -> None:
    recipe = load(write())
    for other in variants(dataclasses.replace(recipe, numerics=0), group):
        assert (fingerprint(other) == fingerprint(recipe)) == (group in WITHOUT_EFFECT), group


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Teacher)])
def test_the_fingerprint_covers_every_field_of_a_teacher(write: Write, field: str) -> None:
    recipe = load(write())
    teacher = recipe.teachers["one"]
    other = {"one": dataclasses.replace(teacher, **{field: changed(getattr(teacher, field))})}
    assert fingerprint(dataclasses.replace(recipe, teachers=other)) != fingerprint(recipe)


def test_the_fingerprint_sees_the_order_of_stages_and_not_where_a_setting_is_written(write: Write) -> None:
    first = load(write("train: {lr: 1.0}\nstages: {a: {steps: 1}, b: {steps: 2}}\n"))
    swapped = load(write("train: {lr: 1.0}\nstages: {b: {steps: 2}, a: {steps: 1}}\n"))
    elsewhere = load(write("stages: {a: {steps: 1, lr: 1}, b: {steps: 2, lr: 1e0}}\n"))
    assert fingerprint(first) != fingerprint(swapped)
    assert fingerprint(first) == fingerprint(elsewhere)


def test_a_fingerprint_is_the_same_in_another_process(write: Write) -> None:
    path = write()
    code = "import sys; from core.config import *; print(fingerprint(load(sys.argv[1])))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == fingerprint(load(path))


def test_reading_recipes_needs_no_torch() -> None:
    code = "import sys; from core.config import load; load('unic-l', 'smoke'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ---- what comes with Retort


@pytest.mark.parametrize("profile", ["", "smoke"])
@pytest.mark.parametrize("name", config.names())
def test_every_recipe_is_the_same_after_being_written_and_read(name: str, profile: str) -> None:
    recipe = complete(load(name, profile))
    again = from_yaml(to_yaml(recipe))
    assert to_yaml(again) == to_yaml(recipe)
    assert fingerprint(again) == fingerprint(recipe)
    assert again.stage_names() == recipe.stage_names()


def test_a_stored_recipe_is_checked_like_any_other() -> None:
    for text in ("a: [", "- a", "", "train: {lrr: 1}", "schema: 9\nname: x\nmethod: {name: unic}"):
        with pytest.raises(ConfigError, match=r"^(run/recipe\.yaml|schema)"):
            from_yaml(text, "run/recipe.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.weights=[1, 2]"], "data.weights: numbers 2, sources 1; give one for data.source and one for each of"),
        (["data.merge=[x]", "data.weights=[1, 0]"], "data.weights: must be above 0"),
        (["data.merge=[x]", "data.weights=[1, 2]", "data.samples=9"], "data.samples: not together with data.weights"),
        (["data.merge=[x]", "data.weights=[1, 2]", "data.repeats=2"], "data.repeats: not together with data.weights"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(write: Write, given: list[str], message: str) -> None:
    assert message in refusal(write(), "", given)


SIZES = {"img_size", "patch_size", "embed_dim", "depth", "depths", "num_heads", "mlp_ratio", "window_size",
         "num_classes"}  # of a network  # fmt: skip
HEADS = {"hidden", "bottleneck", "out", "local_crops", "local_size"}  # sizes and counts among a method's options
STEPS = {"img_size", "steps", "epochs", "batch", "lr_batch", "micro_batch", "warmup_steps", "warmup_epochs"}
WHERE = ("launch", "loader", "checkpoint", "log", "evaluate", "prepare", "data.source", "data.heldout", "data.merge",
         "data.samples", "data.block", "data.texts")  # fmt: skip


def may_differ(field: str) -> bool:
    """Sizes, counts, weights, addresses of data and where a run goes."""
    group, _, last = field.rpartition(".")
    if field.startswith("method.options."):
        return last in HEADS
    if field.split(".")[0] in ("train", "stages"):
        return last in STEPS
    if field.startswith(("student.", "teachers.")):
        return last in ("weights", "text") or (group.endswith(".args") and last in SIZES)
    return field.startswith(WHERE)


@pytest.mark.parametrize("name", config.names())
def test_the_smoke_profile_changes_sizes_counts_weights_and_places_only(name: str) -> None:
    full, smoke = complete(load(name)), complete(load(name, "smoke"))
    a, b = flatten(config.to_dict(full)), flatten(config.to_dict(smoke))
    differ = {key for key in a.keys() | b.keys() if json.dumps(a.get(key, "-")) != json.dumps(b.get(key, "-"))}
    assert [key for key in sorted(differ) if not may_differ(key)] == []
    assert any(key.startswith("train.") for key in differ), "the profile made nothing smaller"
    assert smoke.stage_names() == full.stage_names()
    assert list(smoke.teachers) == list(full.teachers)
    for stage in full.stage_names():
        kinds = [create(r, r.stage(stage), 8).schedules(0).keys() for r in (full, smoke)]
        assert kinds[0] == kinds[1]
