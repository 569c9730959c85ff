"""What no schema says of a manifest and yet makes an API server, a kubelet or KubeRay's operator refuse it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")
LONGEST = {"RayJob": 47, "RayCluster": 53}
TOKENS_SINCE = (2, 52)  # version of Ray
Findings = Iterator[str]


def rules(document: dict[str, Any]) -> Findings:
    kind, meta, spec = document["kind"], document.get("metadata") or {}, document.get("spec") or {}
    name = meta.get("name", "")
    if not NAME.fullmatch(name) or len(name) > 253:
        yield f"metadata.name: {name!r} is not a name"
    if kind in LONGEST and (not DNS_1035.fullmatch(name) or len(name) > LONGEST[kind]):
        yield f"metadata.name: {name!r} is not a name of {LONGEST[kind]} characters that begins with a letter"
    for path, inside in _walk(document):
        if path.endswith("abels"):  # labels, matchLabels, nodeLabels
            for key, value in inside.items():
                if not isinstance(value, str) or len(value) > 63 or not LABEL.fullmatch(value):
                    yield f"{path}.{key}: {value!r} is not the value of a label"
        if "containers" in inside:
            yield from _pod(path, inside)
    if kind == "RayJob":
        if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
            yield "spec.suspend: needs shutdownAfterJobFinishes"
        if not spec.get("entrypoint", "").strip():
            yield "spec.entrypoint: is empty"
        if spec.get("activeDeadlineSeconds", 1) <= 0:
            yield "spec.activeDeadlineSeconds: is not above 0"
        restart = spec.get("submitterPodTemplate", {}).get("spec", {}).get("restartPolicy")
        if restart not in ("Never", "OnFailure"):
            yield f"spec.submitterPodTemplate: restartPolicy {restart} cannot be a Job's"
    if kind in LONGEST:
        yield from _cluster(spec.get("rayClusterSpec", {}) if kind == "RayJob" else spec)


def _cluster(spec: dict[str, Any]) -> Findings:
    groups = spec.get("workerGroupSpecs", [])
    names = [group.get("groupName") for group in groups]
    if len(set(names)) < len(names):
        yield f"workerGroupSpecs: a name is used twice among {names}"
    for group in groups:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        if not least <= group.get("replicas", 0) <= most:
            yield f"{group.get('groupName')}: {group.get('replicas')} replicas are not in {least}..{most}"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
        if version < TOKENS_SINCE:
            yield f"authOptions: Ray {spec.get('rayVersion')} knows no tokens"


def _pod(path: str, spec: dict[str, Any]) -> Findings:
    volumes = [volume.get("name") for volume in spec.get("volumes", [])]
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    for what, names in (("volume", volumes), ("container", [each.get("name") for each in containers])):
        if len(set(names)) < len(names):
            yield f"{path}: a {what} is there twice among {names}"
    for container in containers:
        place = f"{path}.{container.get('name')}"
        for mount in container.get("volumeMounts", []):
            if mount.get("name") not in volumes:
                yield f"{place}: there is no volume {mount.get('name')}"
        names = [each.get("name") for each in container.get("env", [])]
        if len(set(names)) < len(names):
            yield f"{place}: a variable is there twice among {names}"
        for bound in ("requests", "limits"):
            for name, value in container.get("resources", {}).get(bound, {}).items():
                if not QUANTITY.fullmatch(str(value)):
                    yield f"{place}: {value!r} is not an amount of {name}"


def _walk(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a document and where it is."""
    if isinstance(tree, dict):
        yield path, tree
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from _walk(value, f"{path}.{key}".lstrip("."))
