"""Recipes: one order of overlays, strict fields with the nearest name, and what identifies a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import ConfigError, Recipe, fingerprint, from_yaml, load, names, to_dict, to_yaml
from core.methods.base import complete


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "unknown field train.stepz; did you mean train.steps?"),
        ("studnt.name=3", "unknown field studnt.*did you mean student"),
        ("teachers.digits_masked.wieghts=x", "unknown field teachers.digits_masked.wieghts.*weights"),
        ("stages.main.stepss=3", "stages.main.stepss; did you mean stages.main.steps?"),
        ("zero.stage=7", "zero.stage: 7 is not one of 0, 1, 2, 3"),
        ("launch.device=cud", "launch.device: 'cud' is not one of auto, cpu, cuda; did you mean cuda?"),
        ("zero.stage=x", "zero.stage: .*'x'"),
        ("train.steps=-1", "train.steps: must not be negative"),
        ("train.batch=0", "train.batch: must be above 0"),
        ("train.lr=.inf", "train.lr: inf is not a finite number"),
        ("train.batch=33", "train.batch: 33 is not a multiple of micro_batch 32"),
        ("train.betas=[0.9]", "train.betas: "),
        ("train.steps", "not of the form key=value"),
    ],
)
def test_a_wrong_override_names_the_field_and_the_nearest_valid_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", dotlist=[override])


def test_an_unknown_recipe_profile_and_option_give_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean unic-b"):
        load("unic-bb")
    with pytest.raises(ConfigError, match="profile 'smok'"):
        load("demo", "smok")
    with pytest.raises(ConfigError, match="hiden.*did you mean .*hidden"):
        complete(load("demo", dotlist=["method.options.hiden=3"]))


def _write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_an_error_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.yaml", "method: {name: unic}\ntrain:\n  steps: 3\n  setps: 4\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:4: unknown field train\.setps; did you mean train\.steps"):
        load(path)


def test_later_overlays_win_defaults_base_recipe_profile_dotlist(tmp_path: Path) -> None:
    base = _write(
        tmp_path, "base.yaml", "method: {name: unic}\ntrain: {steps: 1, batch: 8, micro_batch: 8, lr: 1.0, eps: 1}\n"
    )
    text = f"base: {base}\ntrain: {{steps: 2, lr: 2.0}}\nprofiles: {{quick: {{train: {{lr: 3.0, clip: 3}}}}}}\n"
    path = _write(tmp_path, "mine.yaml", text)
    train = load(path, "quick", ["train.clip=4"]).train
    assert (train.eps, train.steps, train.lr, train.clip) == (1, 2, 3.0, 4)
    assert train.min_lr == Recipe().train.min_lr


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.yaml")
    _write(tmp_path, "mine.yaml", f"base: {path}\nmethod: {{name: unic}}\n")
    with pytest.raises(ConfigError, match="circle"):
        load(path)


def test_a_stage_is_train_with_its_overlay() -> None:
    recipe = load("unic-l", dotlist=["train.eps=0.5", "stages.s336.epochs=7"])
    assert recipe.stage_names() == ["s224", "s336"]
    assert (recipe.stage("s224").img_size, recipe.stage("s336").img_size) == (224, 336)
    assert recipe.stage("s336").epochs == 7
    assert recipe.stage("s336").eps == 0.5


WHERE_AND_HOW = ["zero.stage=3", "launch.ranks=1", "launch.launcher=local", "store=file:///x", "log.every_steps=7",
                 "loader.workers=9", "checkpoint.every_steps=3", "evaluate.margin=1"]  # fmt: skip


@pytest.mark.parametrize("override", WHERE_AND_HOW)
def test_where_and_how_fast_a_run_goes_is_not_its_identity(override: str) -> None:
    assert fingerprint(load("demo", dotlist=[override])) == fingerprint(load("demo"))


@pytest.mark.parametrize("override", ["seed=1", "train.lr=0.1", "train.micro_batch=16", "student.drop_path=0.2",
                                      "data.block=5", "method.options.drop=0.1", "train.precision=bf16"])  # fmt: skip
def test_what_the_result_depends_on_is_its_identity(override: str) -> None:
    assert fingerprint(load("demo", dotlist=[override])) != fingerprint(load("demo"))


@pytest.mark.parametrize("name", names())
def test_a_resolved_recipe_survives_being_written_and_read(name: str) -> None:
    recipe = complete(load(name))
    again = complete(from_yaml(to_yaml(recipe)))
    assert to_dict(again) == to_dict(recipe)
    assert fingerprint(again) == fingerprint(recipe)


SMOKE_MAY_CHANGE = {
    "prepare", "data.source", "data.heldout", "evaluate.train", "evaluate.test", "evaluate.margin", "evaluate.seeds",
    "train.steps", "train.warmup_steps", "train.batch", "train.micro_batch", "train.img_size", "launch.device",
    "launch.ranks", "loader.workers", "checkpoint.every_steps", "log.every_steps", "log.flush_s",
}  # fmt: skip


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict) or prefix.endswith((".args.",)):
        return {prefix.rstrip("."): tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}{key}.").items()}


@pytest.mark.parametrize("name", names())
def test_the_smoke_profile_changes_sizes_counts_weights_and_where_it_runs_only(name: str) -> None:
    full, smoke = (_flat(to_dict(complete(load(name, profile)))) for profile in ("", "smoke"))
    changed = {key for key in full.keys() | smoke.keys() if full.get(key) != smoke.get(key)}
    sizes = {k for k in changed if k.endswith((".args", ".weights", ".img_size"))}
    assert changed - sizes <= SMOKE_MAY_CHANGE
