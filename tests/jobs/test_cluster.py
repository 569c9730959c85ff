"""Cluster files: strict, and the examples are good."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import ConfigError
from jobs.cluster import Cluster, load, names
from jobs.ray.site import Kubernetes, Toleration


def test_the_examples_load_and_explain_themselves() -> None:
    assert names() == ["apptainer", "bare", "kubernetes", "pyxis"]
    for name in names():
        assert load(name).about
        assert Path(__file__).parents[2].joinpath(f"jobs/clusters/{name}.yaml").read_text().startswith("# ")
    assert [load(name).container for name in names()] == ["apptainer", "", "", "pyxis"]


def test_the_example_for_kubernetes_says_where_pods_go() -> None:
    found = load("kubernetes")
    assert found.image
    assert found.kubernetes.queue == "retort"
    assert found.kubernetes.tolerations == [Toleration("nvidia.com/gpu", "Exists", effect="NoSchedule")]
    assert [load(name).kubernetes for name in names() if name != "kubernetes"] == [Kubernetes()] * 3


def test_a_variable_whose_name_only_sounds_secret_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text('env: {TOKENIZERS_PARALLELISM: "false"}')
    assert load(str(path)).env == {"TOKENIZERS_PARALLELISM": "false"}


def test_no_name_leaves_everything_to_slurm() -> None:
    assert load("") == Cluster()


def test_ranks_of_a_node_are_its_gpus_unless_they_are_counted() -> None:
    assert Cluster().per_node == 1
    assert Cluster(gpus_per_node=8).per_node == 8
    assert Cluster(gpus_per_node=8, tasks_per_node=4).per_node == 4


def test_an_unknown_cluster_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"did you mean pyxis.*there is: apptainer, bare, kubernetes, pyxis"):
        load("pyxi")


@pytest.mark.parametrize(
    ("text", "words"),
    [("partion: gpu", "unknown field partion; did you mean partition"),
     ("\npartition: gpu\ntime_min: soon", ":3: "),
     ("time_min: -1", "time_min: must not be negative"),
     ("container: docker\nimage: x", "container: must be one of apptainer, pyxis"),
     ("container: pyxis", "image: `container: pyxis` needs an image"), ("image: x.sif", "image: an image needs"),
     ("image: x.sif\nkubernetes: {}", "image: an image needs"),
     ("python: venv/bin/python", "python: must be a path from the root"),
     ("gpu_type: h100", "gpu_type: needs gpus_per_node"),
     ("cpus_per_task: 0", "cpus_per_task: must be at least 1"),
     ("shared: [scratch]", "shared: must be a path from the root"),
     ("store: /scratch", "store: '/scratch' is neither"),
     ("mounts: [/data]", "mounts: '/data' is not HOST:INSIDE"),
     ("env: {A B: x}", "env: 'A B' cannot be a variable"),
     ("extra: {Nice One: x}", "extra: 'Nice One' is not an option of sbatch"),
     ("extra: {nodes: '4'}", "extra: nodes is Retort's own to set"),
     ('partition: "gpu\\n#SBATCH --uid=0"', "partition: must be one line"),
     ('extra: {comment: "a\\nrm -rf"}', "extra.comment: must be one line"),
     ('setup: ["a\\nb"]', "setup: must be one line"), ('env: {A: "x\\ny"}', "env.A: must be one line"),
     ('\npartition: "gpu\\e[2J"', ":2: partition: must be one line"), ('env: {"A\\n": x}', "env: must be one line"),
     ("\nsetup: ['echo ${HOME}']", ":2: setup: ${...}"), ("env: {A: '${oc.env:HOME}'}", "$NAME without braces"),
     ("store: '${oc.env:HOME}'", "store: ${...} in '${oc.env:HOME}'"),
     ("env: {AWS_SECRET_ACCESS_KEY: x}", "name a Secret under kubernetes.secrets"),
     ("env: {hf_token: x}", "name a Secret under kubernetes.secrets"),
     ("\nkubernetes:\n  nodes: {a: b}", ":3: unknown field kubernetes.nodes"),
     ("kubernetes:\n  queu: a", ":2: unknown field kubernetes.queu; did you mean kubernetes.queue"),
     ("kubernetes:\n  shm_gb: much", ":2: "), ("kubernetes: {ttl_s: -1}", "kubernetes.ttl_s: must not be negative"),
     ("kubernetes:\n  queue: a\n  secrets: [My Keys]", ":3: kubernetes.secrets: 'My Keys' cannot be a name"),
     ('kubernetes: {namespace: ""}', "kubernetes.namespace: must not be empty"),
     ("kubernetes: {run_as: 0}", "kubernetes.run_as: pods do not run as root"),
     ("kubernetes: {auth: none}", "kubernetes.auth: must be one of token, disabled, got 'none'"),
     ("kubernetes: {priority: high}", "kubernetes.priority: is Kueue's and needs queue"),
     ("kubernetes: {rdma: hca}", "kubernetes.rdma: 'hca' is not the name of a resource"),
     ("kubernetes: {cache_path: mnt}", "kubernetes.cache_path: must be a path from the root"),
     ("kubernetes: {cache_path: /mnt, cache_gb: 5}", "kubernetes.cache_gb: is of a folder that ends with its pod"),
     ("kubernetes: {node_selector: {pool: a b}}", "kubernetes.node_selector: pool: 'a b' is not a label"),
     ("kubernetes:\n  tolerations:\n    - {key: a, efect: NoExecute}", ":2: kubernetes.tolerations: "),
     ("kubernetes: {tolerations: [{key: a, operator: Is}]}", "operator must be one of Equal, Exists, got 'Is'"),
     ("kubernetes: {tolerations: [{key: a, effect: No}]}", "effect must be one of NoSchedule, "),
     ("kubernetes: {tolerations: [{value: a}]}", "kubernetes.tolerations: a key is missing"),
     ("kubernetes: {tolerations: [{key: a, operator: Exists, value: b}]}", "a: `operator: Exists` takes no value"),
     ("kubernetes: {tolerations: [{key: a, seconds: 5}]}", "a: seconds need `effect: NoExecute`")],
)  # fmt: skip
def test_a_mistake_is_named_with_field_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
