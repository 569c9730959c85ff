"""Strict merging of YAML into dataclasses: what is wrong is told by field, file, line and the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.text import control, one_line

REFUSALS = (OmegaConfBaseException, ValueError, TypeError, RecursionError)
# Of a file of settings; with aliases a few lines can stand for any number of values, or for any depth of them.
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 2**18, 20_000, 32
PROSE = ("about",)  # fields that nothing is made of: they may have several lines


class ConfigError(ValueError):
    """A recipe, profile or override is wrong. The message names the field, the file and line, and the fix."""


@dataclass(frozen=True)
class Overlay:
    """Values to merge, and where they were written."""

    values: dict[str, Any]
    file: str
    lines: Mapping[str, int] = field(default_factory=dict)  # dotted key in the file -> its line
    inside: str = ""  # dotted key in the file that the values lie under
    prefix: str = ""  # what stands in front of the values' keys in messages

    def below(self, inside: str, prefix: str, values: Any) -> Overlay:
        """What this overlay holds under one of its keys.  Raises ConfigError when that is not a mapping."""
        found = dataclasses.replace(self, values=values or {}, inside=_join(self.inside, inside), prefix=prefix)
        if not isinstance(found.values, dict):
            raise ConfigError(f"{self.place(inside)}: {inside} must be a mapping of fields")
        return found

    def place(self, key: str) -> str:
        """FILE:LINE of a key, or of what is above it; the file alone where no lines are known."""
        dotted = _join(self.inside, key)
        while dotted and dotted not in self.lines:
            dotted = dotted.rpartition(".")[0]
        return f"{self.file}:{self.lines[dotted]}" if dotted else self.file


TRUTH = re.compile("^(true|True|TRUE|false|False|FALSE)$")


class Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """In which only true and false are truth values, as since YAML 1.2: `off` and `no` are words."""

    yaml_implicit_resolvers = {
        first: [(tag, TRUTH if tag.endswith(":bool") else pattern) for tag, pattern in found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }  # fmt: skip


class TooLarge(yaml.YAMLError):  # type: ignore[misc]
    """More than a file of settings holds."""


def load_yaml(text: str) -> Any:
    """Plain data only, as `Yaml` constructs what its safe base does and nothing else.  Raises yaml.YAMLError."""
    return _construct(_compose(text))


def _compose(text: str) -> Any:
    """The nodes of a text of bounded size, each alias standing for one node.  Raises yaml.YAMLError."""
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"{len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        node = yaml.compose(text, Loader=Yaml)
        values, depth = _extent(node, {})
    except RecursionError:
        raise TooLarge("values lie too deep inside of each other") from None
    if values > MAX_VALUES or depth > MAX_DEPTH:
        raise TooLarge(
            f"it stands for {values:,} values, {depth} deep; at most {MAX_VALUES:,} and {MAX_DEPTH} are read"
        )
    return node


def _extent(node: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for with all aliases written out, and how deep they lie; each node is seen once."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise yaml.YAMLError("an alias stands inside of its own anchor")
        return found
    known[id(node)] = None
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    below = [_extent(each, known) for part in inside for each in (part if isinstance(part, tuple) else (part,))]
    known[id(node)] = found = (1 + sum(n for n, _ in below), 1 + max((depth for _, depth in below), default=0))
    return found


def _construct(node: Any) -> Any:
    loader = Yaml("")
    try:
        return None if node is None else loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # a date that is none, a number of too many digits
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def read(path: Path) -> Overlay:
    """Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            return parse(file.read(MAX_CHARACTERS + 1), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None


def parse(text: str, file: str) -> Overlay:
    """Raises ConfigError: not YAML, not a mapping, or a key given twice (YAML itself would take the last one)."""
    lines: dict[str, int] = {}
    try:
        node = _compose(text)
        _index(node, "", lines, file)
        values = _construct(node)
    except TooLarge as error:
        raise ConfigError(f"{file}: too large for a file of settings: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a recipe is a mapping of fields")
    return Overlay(values, file, lines)


def merge(config: DictConfig, schema: type, overlay: Overlay) -> DictConfig:
    """`config`, a structured configuration of dataclass `schema`, with the overlay's values as they are written.

    Raises ConfigError, also for what is no plain value: `${...}`, which would be filled in, and control characters.
    """
    _require_plain(overlay)
    for key, beside in _unknown(schema, overlay.values):
        hint = _suggest(schema, key, beside, overlay.prefix)
        raise ConfigError(f"{overlay.place(key)}: unknown field {_join(overlay.prefix, key)}{hint}")
    try:
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.create(overlay.values)))
    except REFUSALS as error:
        _explain(config, overlay, error)


def to_object(config: DictConfig) -> Any:
    """The dataclass of a structured configuration.  Raises ConfigError."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from None


def nearest(name: str, valid: list[str]) -> str:
    """A hint to append to an error: the nearest valid name, if one is near."""
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def flatten(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _require_plain(overlay: Overlay) -> None:
    """Raises ConfigError: nothing is filled in here, and what scripts are made of is one line of text."""
    for key, text in texts(overlay.values):
        dotted = _join(overlay.prefix, key)
        if "${" in text:
            advice = "nothing is filled in here: write the value itself (in a line of shell, $NAME without braces)"
            raise ConfigError(f"{overlay.place(key)}: {one_line(dotted)}: ${{...}} in {text[:200]!r}; {advice}")
        if found := control(text, lines=dotted.partition(".")[0] in PROSE):
            raise ConfigError(
                f"{overlay.place(key)}: {one_line(dotted)}: must be one line, and {text[:200]!r} holds {found}"
            )


def texts(values: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Every text among the values, keys included, with the dotted key of the field that it stands in."""
    if isinstance(values, str):
        yield above, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield above, str(key)
            yield from texts(value, _join(above, str(key)))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from texts(value, above)


def _index(node: Any, above: str, lines: dict[str, int], file: str) -> None:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        dotted, line = f"{above}{key.value}", key.start_mark.line + 1
        if dotted in lines:
            raise ConfigError(f"{file}:{line}: {dotted} is given twice, first in line {lines[dotted]}; remove one")
        lines[dotted] = line
        _index(value, f"{dotted}.", lines, file)


def _unknown(schema: Any, values: Any, above: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted key, names that are valid in its place) of every key that the schema does not have."""
    if not isinstance(values, dict):
        return
    if dataclasses.is_dataclass(schema):
        hints = get_type_hints(schema)
        for key, value in values.items():
            if key in hints:
                yield from _unknown(hints[key], value, f"{above}{key}.")
            else:
                yield f"{above}{key}", list(hints)
    elif get_origin(schema) is dict:  # any key; Any as its values is open
        for key, value in values.items():
            yield from _unknown(get_args(schema)[1], value, f"{above}{key}.")


def _suggest(schema: type, key: str, beside: list[str], prefix: str) -> str:
    above, _, name = key.rpartition(".")
    if near := difflib.get_close_matches(name, beside, 1, 0.5):
        return f"; did you mean {_join(prefix, _join(above, near[0]))}?"
    everywhere = list(_names(schema))
    same = [dotted for dotted in everywhere if dotted.rpartition(".")[2] == name]
    return f"; did you mean {_join(prefix, same[0])}?" if same else nearest(key, everywhere)


def _names(schema: Any, above: str = "") -> Iterator[str]:
    """Dotted names of all fields, groups included."""
    for name, hint in get_type_hints(schema).items():
        yield f"{above}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _names(hint, f"{above}{name}.")


def _explain(config: DictConfig, overlay: Overlay, error: Exception) -> NoReturn:
    """Raise ConfigError for the first value that is refused when it is merged alone."""
    for key, value in flatten(overlay.values).items():
        try:
            OmegaConf.merge(config, OmegaConf.create(nested(key, value)))
        except REFUSALS as reason:
            shown = f"{_join(overlay.prefix, key)}: {_first_line(reason)}"
            raise ConfigError(f"{overlay.place(key)}: {shown}") from None
    raise ConfigError(f"{overlay.place('')}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _join(above: str, key: str) -> str:
    return f"{above}.{key}" if above and key else above or key


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in keys}
