from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.config import ConfigError, from_yaml
from core.methods.base import Method
from core.methods.unic import Unic
from core.recipe import Recipe
from core.registry import available, complete, create, find
from tests import toy


def test_methods_are_found_by_the_names_of_their_files() -> None:
    assert "unic" in available()
    assert not {"base", "__init__"} & set(available())
    assert find("unic") is Unic
    with pytest.raises(ConfigError, match=r"method.name: unknown method 'unik'; did you mean unic\?"):
        find("unik")
    with pytest.raises(ConfigError, match="unknown method"):
        find("../base")


OTHER = """
from __future__ import annotations
from dataclasses import dataclass
from core.methods.base import Method

@dataclass
class Options:
    size: int = 3

class Other(Method):
    Options = Options

METHOD = Other
"""


def test_methods_of_other_folders_are_found_and_cannot_replace_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "unic"):
        (tmp_path / f"{name}.py").write_text(OTHER)
    assert "mine" not in available()
    monkeypatch.setenv("RETORT_METHODS", f"{tmp_path}:/nowhere")
    assert "mine" in available()
    assert issubclass(find("mine"), Method)
    assert find("unic") is Unic
    sys.modules.pop("retort_methods.mine", None)


def with_options(**options: object) -> Recipe:
    made = toy.recipe()
    made.method.options = options
    return made


def test_options_left_out_are_the_published_ones() -> None:
    options = complete(with_options(hidden=5)).method.options
    assert options["hidden"] == 5
    assert (options["last_hidden"], options["lambda_cos"], options["drop"]) == (3072, 0.5, 0.5)
    assert tuple(options["momentum"]) == (1.0, 0.001)
    method = create(with_options(hidden=5), toy.recipe().train, 10)
    assert (method.options.hidden, method.steps) == (5, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": 5}, "unknown field method.options.hiden; did you mean method.options.hidden?"),
        ({"hidden": "wide"}, "method.options.hidden: Value 'wide' of type 'str' could not be converted to Integer"),
        ({"drop": None}, "method.options.drop: "),
        ({"momentum": [1.0]}, "method.options.momentum: "),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        complete(with_options(**options))
    assert message in str(error.value)


def test_a_recipe_needs_teachers_with_names() -> None:
    text = "name: x\nmethod: {name: unic}\n"
    with pytest.raises(ConfigError, match="teachers: method unic needs at least one teacher"):
        complete(from_yaml(text))
    with pytest.raises(ConfigError, match="teachers.a.name: not set"):
        complete(from_yaml(f"{text}teachers: {{a: {{weights: random}}}}\n"))
