"""Manifests checked without a cluster: what an API server or an operator would refuse.

`findings`: kinds of Kubernetes itself, and the pod templates inside of other kinds, are read with the models of the
Python client, which know every field and type; rules.py adds what no schema says. `against_crd`: kinds of KubeRay and
Kueue are compared with the schemas of their CRDs. Those are not part of this project; they are looked for in the folder
RETORT_CRDS, else in ../shared/crds beside it. What is written in them as CEL is not evaluated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jobs.errors import nearest
from tests.k8s.rules import rules

CRDS = Path(os.environ.get("RETORT_CRDS") or Path(__file__).parents[3] / "shared" / "crds")
MISSING = f"no CRD schemas in {CRDS}: set RETORT_CRDS to a folder with those of KubeRay and Kueue"
GROUPS = ("ray.io/", "kueue.x-k8s.io/")
TEMPLATES = ("template", "submitterPodTemplate")  # fields that hold a pod
TYPES = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "object": dict, "array": list}
# What bounds a value: keyword, what is compared, and the comparison that it has to pass.
BOUNDS: tuple[tuple[str, type | tuple[type, ...], Callable[[Any, Any], bool]], ...] = (
    ("enum", object, lambda value, allowed: value in allowed),
    ("pattern", str, lambda value, pattern: re.search(pattern, value) is not None),
    ("minLength", str, lambda value, least: len(value) >= least),
    ("maxLength", str, lambda value, most: len(value) <= most),
    ("minimum", (int, float), lambda value, least: value >= least),
    ("maximum", (int, float), lambda value, most: value <= most),
    ("minItems", list, lambda value, least: len(value) >= least),
    ("maxItems", list, lambda value, most: len(value) <= most),
    ("maxProperties", dict, lambda value, most: len(value) <= most),
)
KNOWN = {name for name, _, _ in BOUNDS} | {
    "type", "properties", "additionalProperties", "items", "required", "default", "nullable", "anyOf", "format",
    "description", "x-kubernetes-int-or-string", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    "x-kubernetes-map-type", "x-kubernetes-validations",
}  # fmt: skip
Findings = Iterator[str]


def findings(document: dict[str, Any]) -> list[str]:
    """What is wrong, with the path to it, as far as can be told without CRDs."""
    if has_crd(document):
        found = [*model("V1ObjectMeta", document.get("metadata"), "metadata"), *_pods(document)]
    else:
        found = [*model(f"V1{document['kind']}", document)]
    return [*found, *rules(document)]


def has_crd(document: dict[str, Any]) -> bool:
    return document["apiVersion"].startswith(GROUPS)


def against_crd(document: dict[str, Any]) -> list[str]:
    """What is wrong of a kind of KubeRay's or Kueue's.  Raises KeyError for a kind or version that they do not have."""
    schema = crds()[document["apiVersion"], document["kind"]]
    return list(violations(schema, {key: value for key, value in document.items() if key != "metadata"}, ""))


@cache
def crds() -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas by (apiVersion, kind); none where the folder is missing."""
    found = {}
    for path in sorted(CRDS.glob("*.json")):
        spec = json.loads(path.read_text())["spec"]
        for version in spec["versions"]:
            name = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[name] = version["schema"]["openAPIV3Schema"]
    return found


def model(name: str, value: Any, path: str = "") -> Findings:
    """What the client's model of this name has against a value."""
    from kubernetes import client
    from pydantic import ValidationError

    try:
        made = getattr(client, name).model_validate(value)
    except ValidationError as error:
        for each in error.errors():
            yield f"{path}.{'.'.join(map(str, each['loc']))}: {each['msg']}".lstrip(".")
        return
    if client.ApiClient(client.Configuration()).sanitize_for_serialization(made) != value:
        yield f"{path}: a field is spelt as in Python, not as in a manifest".lstrip(".")


def _pods(tree: Any, path: str = "") -> Findings:
    """The pod templates inside of a document."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        place = f"{path}.{key}".lstrip(".")
        if key in TEMPLATES:
            yield from model("V1PodTemplateSpec", value, place)
        else:
            yield from _pods(value, place)


def violations(schema: dict[str, Any], value: Any, path: str) -> Findings:
    """Where a value does not follow a structural schema."""
    unknown = schema.keys() - KNOWN
    assert not unknown, f"{path}: this check does not know {unknown}"
    if value is None:
        if not schema.get("nullable"):
            yield f"{path}: has no value"
        return
    if schema.get("x-kubernetes-int-or-string"):
        right = isinstance(value, int | str) and not isinstance(value, bool)
    else:
        kind = schema.get("type", "object")
        right = isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if not right:
        yield f"{path}: {value!r} is not {schema.get('type', 'a number or a string')}"
        return
    for keyword, kinds, holds in BOUNDS:
        if keyword in schema and isinstance(value, kinds) and not holds(value, schema[keyword]):
            yield f"{path}: {value!r} does not keep {keyword} {schema[keyword]}"
    if isinstance(value, dict):
        yield from _fields(schema, value, path)
    elif isinstance(value, list):
        yield from _items(schema, value, path)


def _fields(schema: dict[str, Any], value: dict[str, Any], path: str) -> Findings:
    fields, rest = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value and "default" not in fields.get(name, {}):  # filled in before it is looked for
            yield f"{path}.{name}: is missing".lstrip(".")
    for name, inside in value.items():
        place = f"{path}.{name}".lstrip(".")
        if name in fields:
            yield from violations(fields[name], inside, place)
        elif isinstance(rest, dict):
            yield from violations(rest, inside, place)
        elif not rest:
            yield f"{place}: unknown field{nearest(name, fields)}"


def _items(schema: dict[str, Any], value: list[Any], path: str) -> Findings:
    keys, fields = schema.get("x-kubernetes-list-map-keys"), schema["items"].get("properties", {})
    seen = []
    for number, inside in enumerate(value):
        yield from violations(schema["items"], inside, f"{path}[{number}]")
        own = inside
        if keys and isinstance(inside, dict):
            own = [inside.get(key, fields.get(key, {}).get("default")) for key in keys]
        if own in seen and (keys or schema.get("x-kubernetes-list-type") == "set"):
            yield f"{path}[{number}]: {own} is there already"
        seen.append(own)
