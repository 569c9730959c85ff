"""What lies in k8s/ and what is made of it: an API server would take it, and its parts fit each other."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.config import names
from core.storage import open_store
from jobs import cluster
from jobs.ray.kube import NEEDED
from jobs.ray.manifest import TEMPLATE
from tests.jobs.ray import golden
from tests.k8s import schema
from tests.k8s.conftest import FOLDER, Objs
from tests.ranks import free_port

Obj = dict[str, Any]
Overlay = Callable[[str], Objs]
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
FILES = [TEMPLATE, *map(golden.path, names())]


def read(path: Path) -> Objs:
    return list(yaml.safe_load_all(path.read_text()))


def named(objects: Objs, kind: str, name: str) -> Obj:
    return next(each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)


def pods(tree: Any) -> Iterator[Obj]:
    """Every pod template."""
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    if isinstance(tree, dict) and "containers" in tree.get("spec", {}):
        yield tree
    for each in inside:
        yield from pods(each)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_a_manifest(path: Path) -> None:
    assert [schema.findings(document) for document in read(path)] == [[] for _ in read(path)]


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_manifest_follows_the_operator_s_schema(path: Path) -> None:
    assert schema.against_crd(read(path)[0]) == []


@pytest.mark.usefixtures("crds")
def test_a_rayjob_of_workers_follows_the_operator_s_schema() -> None:
    assert schema.against_crd(golden.crew()[0]) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_renders_and_nothing_is_wrong_with_it(overlay: Overlay, name: str) -> None:
    objects = overlay(name)
    assert objects
    assert {each["metadata"]["name"]: schema.findings(each) for each in objects if schema.findings(each)} == {}


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize("name", ["interactive", "kueue"])
def test_an_overlay_follows_the_operators_schemas(overlay: Overlay, name: str) -> None:
    own = [each for each in overlay(name) if schema.has_crd(each)]
    assert own
    assert [schema.against_crd(each) for each in own] == [[] for _ in own]


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_of_an_overlay_have_no_more_rights_than_they_need(overlay: Overlay, name: str) -> None:
    for pod in pods(overlay(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            rights, limits = container["securityContext"], container["resources"]["limits"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= limits.keys()


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_those_who_submit_may_do_what_submitting_does_and_read_no_secret(overlay: Overlay, name: str) -> None:
    role = named(overlay(name), "Role", "retort-submitter")
    granted = {(verb, group, resource) for rule in role["rules"] for verb in rule["verbs"]
               for group in rule["apiGroups"] for resource in rule["resources"]}  # fmt: skip
    assert set(NEEDED) | {("get", "", "pods/log"), ("list", "kueue.x-k8s.io", "workloads")} <= granted
    assert not {resource for _, _, resource in granted} & {"secrets", "configmaps", "*"}
    assert "*" not in {verb for verb, _, _ in granted}


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_is_given_a_shell_in_the_pods_of_others(overlay: Overlay, name: str) -> None:
    rules = [rule for each in overlay(name) if each["kind"] in ("Role", "ClusterRole") for rule in each["rules"]]
    granted = {resource for rule in rules for resource in rule["resources"]}
    assert not granted & {"pods/exec", "pods/attach", "pods/ephemeralcontainers", "*", "pods/*"}
    assert all(rule.get("resourceNames") for rule in rules if "secrets" in rule["resources"])


def test_a_shell_in_pods_is_asked_for_by_itself() -> None:
    role, binding = yaml.safe_load_all((FOLDER / "overlays/interactive/exec.yaml").read_text())
    assert [schema.findings(each) for each in (role, binding)] == [[], []]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create"]}]


def test_what_the_example_cluster_file_names_is_there(overlay: Overlay) -> None:
    site = cluster.load("kubernetes").kubernetes
    queue, dev, prod = overlay("kueue"), overlay("dev"), overlay("prod")
    assert named(queue, "LocalQueue", site.queue)["metadata"]["namespace"] == site.namespace
    assert named(queue, "WorkloadPriorityClass", site.priority)
    for objects in (dev, prod):
        assert named(objects, "Namespace", site.namespace)
        assert named(objects, "ServiceAccount", site.service_account)
        assert [named(objects, "ConfigMap", name) for name in site.config_maps]
    assert [named(dev, "Secret", name) for name in site.secrets]
    assert not [each for each in prod if each["kind"] == "Secret"], "made by hand, and in no file"


def test_a_queue_covers_all_that_pods_ask_for(overlay: Overlay) -> None:
    groups = named(overlay("kueue"), "ClusterQueue", "retort")["spec"]["resourceGroups"]
    covered = {resource for group in groups for resource in group["coveredResources"]}
    asked = {resource for pod in pods(read(golden.path("unic-l"))) for container in pod["spec"]["containers"]
             for resource in container["resources"]["requests"]}  # fmt: skip
    assert asked - covered == {"rdma/hca"}, "which this cluster file has, and the queue's comment speaks of"


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_network_policies_let_pods_of_runs_reach_each_other_and_nobody_else_reach_them(
    overlay: Overlay, name: str
) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in overlay(name) if each["kind"] == "NetworkPolicy"}
    assert policies["retort-nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    runs = {"matchExpressions": [{"key": "retort.dev/run", "operator": "Exists"}]}
    assert policies["retort-runs"]["podSelector"] == runs
    assert policies["retort-runs"]["ingress"] == [
        {"from": [{"podSelector": runs}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ray-system"}}}],
         "ports": [{"port": 8265, "protocol": "TCP"}]},
    ]  # fmt: skip
    out = policies["retort-runs"]["egress"]
    assert [[port["port"] for port in rule.get("ports", ())] for rule in out] == [[], [53, 53], [443]]
    for pod in [*pods(read(golden.path("unic-l"))), *pods(golden.crew())]:
        assert "retort.dev/run" in pod["metadata"]["labels"]


def test_the_store_of_the_dev_overlay_has_its_bucket_when_it_is_ready(
    overlay: Overlay, aws_env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own commands run here, on another port."""
    objects, port = overlay("dev"), str(free_port())
    container = named(objects, "Deployment", "retort-store")["spec"]["template"]["spec"]["containers"][0]
    told = named(objects, "ConfigMap", "retort-store")["data"]
    secret = named(objects, "Secret", "retort-store")["data"]
    for key, value in {**told, **{key: base64.b64decode(text).decode() for key, text in secret.items()}}.items():
        aws_env.setenv(key, value)
    service = named(objects, "Service", "retort-store")["spec"]["ports"][0]["port"]
    assert told["AWS_ENDPOINT_URL"] == f"http://retort-store:{service}"
    aws_env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    aws_env.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def here(command: list[str]) -> list[str]:
        return [word.replace("9000", port) for word in command]

    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(here(container["command"]), stdout=log, stderr=log)
        try:
            subprocess.run(here(container["lifecycle"]["postStart"]["exec"]["command"]), check=True, timeout=90)
            probe = container["readinessProbe"]["httpGet"]["path"]
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert direct.open(f"http://127.0.0.1:{port}{probe}", timeout=10).status == 200
            store = open_store("s3://retort/some/prefix")
            store.put("a", b"1")
            assert store.get("a") == b"1"
        finally:
            server.kill()
            server.wait()


def test_every_file_that_the_guide_names_is_there() -> None:
    text = (FOLDER / "README.md").read_text()
    named = re.findall(r"(?<![\w/-])(?:k8s|jobs|docker)/[\w./-]*\w", text)
    linked = [f"k8s/{path}" for path in re.findall(r"\]\(([\w./-]+)\)", text)]
    made = {"k8s/out/unic-l.yaml", "jobs/clusters/mine.yaml"}  # by what the guide says
    assert linked
    assert made <= set(named)
    assert [path for path in [*named, *linked] if path not in made and not (FOLDER.parent / path).exists()] == []
