"""Sentences from the payloads of text tables: captions, class names or tags in a prompt, or plain text."""

from __future__ import annotations

from functools import cache
from typing import Any

from core import small_json
from core.data.source import DataError

MARKS = ("captions", "caption", "tags", "task")


class CorruptText(DataError):  # noqa: N818 (says what it is)
    """One row's payload holds no sentence."""


@cache
def templates() -> list[str]:
    """CLIP's 80 prompts for ImageNet, and the bare name: 81 strings with one {}."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES] + ["{}."]


def prompt(template: str, name: str) -> str:
    """A class name in a template: commas are removed, a plus becomes a blank."""
    return template.format(name.replace(",", "").replace("+", " "))


def candidates(payload: str) -> list[str]:
    """All sentences that a payload stands for, equally probable.

    An object gives its `captions`, else its `caption` (a string, or a list of which one is meant), else its `tags` or
    the `class_name` of a classification `task` in each of the templates.  Of a list the first element counts, a string
    is itself, and what is not JSON is the sentence.  "[unused0]" stands for a person.
    Raises CorruptText for anything else: numbers, null, empty lists, objects without a sentence, and JSON strings that
    name one of MARKS, which are most likely broken objects.
    """
    try:
        value = small_json.parse(payload, object, "a sentence")
    except small_json.Excessive as error:
        raise CorruptText(f"no sentence in {payload[:80]!r}: {error.why}") from None
    except small_json.Unreadable:
        value, found = None, [payload]
    else:
        found = _sentences(value[0] if isinstance(value, list) and value else value)
    if not found or not all(isinstance(text, str) for text in found):
        raise CorruptText(f"no sentence in {payload[:80]!r}: give captions, caption, tags, class_name or plain text")
    return [_whole(text).replace("[unused0]", "person") for text in found]


def _whole(text: str) -> str:
    """Without halves of characters, which JSON can spell (a cut "\\ud83d") and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sentences(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [] if any(mark in value for mark in MARKS) else [value]
    if not isinstance(value, dict):
        return []
    for key in ("captions", "caption"):
        if key in value:
            return _one_or_many(value[key])
    if "tags" in value:
        return _prompts(value["tags"])
    if value.get("task") == "classification":
        return _prompts(value.get("class_name"))
    return []


def _one_or_many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _prompts(names: Any) -> list[Any]:
    names = _one_or_many(names)
    if not all(isinstance(name, str) for name in names):
        return []
    return [prompt(template, name) for name in names for template in templates()]


def sentence(payload: str, draw: float) -> str:
    """One of the candidates, picked by a draw from [0, 1).  Raises CorruptText."""
    found = candidates(payload)
    return found[int(draw * len(found))]
