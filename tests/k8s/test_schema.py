"""The checker finds mistakes that are planted, and nothing in what is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.jobs.ray import golden
from tests.k8s import schema

Obj = dict[str, Any]


@pytest.fixture(scope="module")
def right() -> Obj:
    """A RayJob in which there is nothing to find."""
    job: Obj = next(yaml.safe_load_all(golden.path("unic-l").read_text()))
    return job


def put(*keys: Any, value: Any) -> Callable[[Obj], None]:
    """Sets what is at the keys; None: removes it."""

    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        if value is None:
            del tree[keys[-1]]
        else:
            tree[keys[-1]] = value

    return change


CLUSTER = ("spec", "rayClusterSpec")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")
BOX = (*POD, "containers", 0)
TWICE = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]


def test_nothing_is_found_in_what_is_right(right: Obj) -> None:
    assert schema.findings(right) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [(put(*BOX, "imagePullPolizy", value="Always"), "containers.0.imagePullPolizy: Extra inputs"),
     (put(*BOX, "image_pull_policy", value="Always"), "a field is spelt as in Python"),
     (put(*BOX, "name", value=None), "containers.0.name: Field required"),
     (put(*POD, "hostNetwork", value="yes"), "hostNetwork: Input should be a valid boolean"),
     (put(*POD, "terminationGracePeriodSeconds", value="180"), "terminationGracePeriodSeconds: Input should be"),
     (put(*BOX, "resources", "limits", "cpu", value=4), "limits.cpu: Input should be a valid string"),
     (put(*BOX, "resources", "limits", "memory", value="64 GB"), "'64 GB' is not an amount of memory"),
     (put(*BOX, "volumeMounts", 0, "name", value="shn"), "there is no volume shn"),
     (put(*BOX, "env", value=TWICE), "a variable is there twice"),
     (put(*POD, "volumes", 1, "name", value="shm"), "a volume is there twice"),
     (put("metadata", "labels", "retort.dev/run", value="a" * 64), "is not the value of a label"),
     (put("metadata", "labels", "retort.dev/run", value=1), "labels.retort.dev/run"),
     (put(*GROUP, "template", "metadata", "labels", "a", value="b c"), "'b c' is not the value of a label"),
     (put("metadata", "name", value="a" * 48), "is not a name of 47 characters"),
     (put("metadata", "name", value="3d"), "is not a name of 47 characters that begins with a letter"),
     (put("spec", "shutdownAfterJobFinishes", value=False), "spec.suspend: needs shutdownAfterJobFinishes"),
     (put("spec", "entrypoint", value=" "), "spec.entrypoint: is empty"),
     (put("spec", "activeDeadlineSeconds", value=0), "spec.activeDeadlineSeconds: is not above 0"),
     (put("spec", "submitterPodTemplate", "spec", "restartPolicy", value="Always"), "cannot be a Job's"),
     (put(*GROUP, "maxReplicas", value=0), "1 replicas are not in 1..0"),
     (put(*CLUSTER, "rayVersion", value="2.51.1"), "Ray 2.51.1 knows no tokens")],
)  # fmt: skip
def test_a_planted_mistake_is_found_without_any_schema(right: Obj, change: Callable[[Obj], None], words: str) -> None:
    wrong = copy.deepcopy(right)
    change(wrong)
    assert words in "\n".join(schema.findings(wrong))


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize(
    ("change", "words"),
    [(put("spec", "submisionMode", value="K8sJobMode"), "submisionMode: unknown field; did you mean submissionMode?"),
     (put(*BOX, "imagePullPolizy", value="x"), "template.spec.containers[0].imagePullPolizy: unknown field"),
     (put("spec", "backoffLimit", value="3"), "spec.backoffLimit: '3' is not integer"),
     (put("spec", "suspend", value=1), "spec.suspend: 1 is not boolean"),
     (put("spec", "ttlSecondsAfterFinished", value=True), "ttlSecondsAfterFinished: True is not integer"),
     (put(*GROUP, "rayStartParams", "num-cpus", value=4), "rayStartParams.num-cpus: 4 is not string"),
     (put(*GROUP, "groupName", value=None), "workerGroupSpecs[0].groupName: is missing"),
     (put(*CLUSTER, "headGroupSpec", value=None), "spec.rayClusterSpec.headGroupSpec: is missing"),
     (put(*CLUSTER, "authOptions", "mode", value="tokens"), "authOptions.mode: 'tokens' does not keep enum"),
     (put(*BOX, "env", value=TWICE), "env[1]: ['A'] is there already"),
     (put(*BOX, "resources", "limits", "cpu", value="four"), "limits.cpu: 'four' does not keep pattern"),
     (put(*BOX, "resources", "limits", "cpu", value=[4]), "limits.cpu: [4] is not a number or a string"),
     (put(*POD, "volumes", value={}), "spec.volumes: {} is not array")],
)  # fmt: skip
def test_a_planted_mistake_is_found_with_the_operator_s_schema(
    right: Obj, change: Callable[[Obj], None], words: str
) -> None:
    wrong = copy.deepcopy(right)
    change(wrong)
    assert words in "\n".join(schema.against_crd(wrong))


@pytest.mark.usefixtures("crds")
def test_defaults_are_filled_in_before_anything_is_missed(right: Obj) -> None:
    partial = copy.deepcopy(right)
    del partial["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
    assert schema.against_crd(partial) == []


@pytest.mark.usefixtures("crds")
def test_a_version_that_the_operator_does_not_serve_is_no_schema(right: Obj) -> None:
    with pytest.raises(KeyError):
        schema.against_crd({**right, "apiVersion": "ray.io/v1alpha1"})


@pytest.mark.parametrize(
    ("document", "words"),
    [({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "a"},
       "spec": {"minAvailabel": 1}}, "spec.minAvailabel: Extra inputs"),
     ({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "a"},
       "rules": [{"resources": ["pods"], "verbs": "get"}]}, "rules.0.verbs: Input should be a valid list"),
     ({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "a"}},
      "roleRef: Field required"),
     ({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "A_b"},
       "spec": {"podSelector": {}, "ingress": {}}}, "metadata.name: 'A_b' is not a name"),
     ({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": "80"}]}},
      "spec.ports.0.port: Input should be a valid integer")],
)  # fmt: skip
def test_a_planted_mistake_is_found_in_kinds_of_kubernetes_itself(document: Obj, words: str) -> None:
    assert words in "\n".join(schema.findings(document))


@pytest.mark.parametrize(
    ("shape", "value", "words"),
    [({"type": "string", "minLength": 1}, "", "minLength"), ({"type": "string", "maxLength": 1}, "ab", "maxLength"),
     ({"type": "integer", "minimum": 1}, 0, "minimum"), ({"type": "integer", "maximum": 1}, 2, "maximum"),
     ({"type": "array", "items": {}, "minItems": 1}, [], "minItems"),
     ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [1, 2], "maxItems"),
     ({"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}, ["a", "a"], "is there already"),
     ({"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 1}, {"a": "", "b": ""},
      "maxProperties"),
     ({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": None}, "a: has no value")],
)  # fmt: skip
def test_each_bound_of_a_schema_is_kept(shape: Obj, value: Any, words: str) -> None:
    assert words in "\n".join(schema.violations(shape, value, "a"))


def test_a_schema_that_says_more_than_this_check_understands_is_an_error() -> None:
    with pytest.raises(AssertionError, match="uniqueItems"):
        list(schema.violations({"type": "array", "items": {}, "uniqueItems": True}, [], "a"))
