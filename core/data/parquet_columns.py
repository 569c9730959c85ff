"""Which columns of a parquet table are image, label and text: what the hub's own notes say, else names and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core import small_json
from core.data.source import DataError

_IMAGES = ("image", "img", "jpg", "png", "webp")
_LABELS = ("label", "fine_label", "labels", "cls", "class")
_TEXTS = ("caption", "captions", "text")
_MOST_CLASSES = 1 << 20


class NoImages(DataError):  # noqa: N818 - says what it is
    """A table of something else."""


@dataclass(frozen=True)
class Columns:
    """Names; label and text are empty where there is none.  classes: empty where labels have no names."""

    image: str
    label: str
    text: str
    classes: list[str]
    licence: str


def find_columns(schema: pa.Schema, where: str) -> Columns:
    """Raises NoImages without a column of images."""
    info = _notes(schema)
    features = info.get("features") or {}
    image = _choose(schema, features, "Image", _IMAGES, _holds_images)
    if not image:
        raise NoImages(f"{where}: none of the columns {', '.join(schema.names)} holds image files; give the files of "
                        "a data set of images")  # fmt: skip
    label = _choose(schema, features, "ClassLabel", _LABELS, _holds_labels)
    text = _choose(schema, features, "", _TEXTS, _holds_texts)
    classes = [str(name) for name in features.get(label, {}).get("names") or ()]
    return Columns(image, label, text, classes, str(info.get("license") or ""))


def numbered(values: Sequence[Any], classes: list[str], where: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes and (N,) numbers of labels that are numbers, names or None.  Raises DataError."""
    words = sorted({value for value in values if isinstance(value, str)})
    classes = classes or words
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(v, -2) if isinstance(v, str) else -1 if v is None else v for v in values], np.int64)
    highest = int(labels.max(initial=-1))
    if (labels < -1).any() or highest >= (len(classes) or _MOST_CLASSES):
        raise DataError(f"{where}: labels from {labels.min()} to {highest} do not fit {len(classes)} classes; correct "
                        "the files")  # fmt: skip
    return classes or [str(i) for i in range(highest + 1)], labels


def _notes(schema: pa.Schema) -> dict[str, Any]:
    """What the hub's library has written into the schema."""
    try:
        noted = (schema.metadata or {}).get(b"huggingface", b"{}")
        info = small_json.parse(noted, dict, "huggingface", small_json.LARGE)["info"]
    except (ValueError, KeyError, TypeError):
        return {}
    return info if isinstance(info, dict) else {}


def _choose(
    schema: pa.Schema, features: dict[str, Any], kind: str, names: Sequence[str], fits: Callable[[pa.DataType], bool]
) -> str:
    """The column that is of this kind, has one of these names, and fits: in this order of weight."""
    fitting = [field.name for field in schema if fits(field.type)]
    noted = [name for name in fitting if isinstance(features.get(name), dict) and features[name].get("_type") == kind]
    for candidates in (noted if kind else [], fitting):
        for name in names:
            if name in candidates:
                return name
    return noted[0] if kind and noted else ""


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_labels(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_integer(kind)) or _is_string(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    return _is_string(kind) or (bool(pa.types.is_list(kind)) and _is_string(kind.value_type))
