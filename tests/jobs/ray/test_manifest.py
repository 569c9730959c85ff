"""Manifests: what the recipe and the cluster file say arrives in the pods, and nothing secret does."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml

from core.config import names
from core.recipe import Launch, Loader, Recipe, Train
from jobs.cluster import Cluster
from jobs.errors import UserError
from jobs.placement import Placement, spread
from jobs.ray import command, manifest
from jobs.ray.site import Kubernetes, Toleration
from tests.jobs.ray import golden
from tests.k8s import schema

FOUR = Placement(4, "cuda", 3, nodes=2)
SITE = Cluster(image="registry.example.org/retort:1", gpus_per_node=2, cpus_per_task=6, mem_gb=64)
Obj = dict[str, Any]


def recipe(**launch: Any) -> Recipe:
    return Recipe(name="demo", train=Train(batch=64, micro_batch=8), launch=Launch(**launch))


def documents(
    cluster: Cluster = SITE, placement: Placement = FOUR, made: Recipe | None = None, run: str = "demo-0123456789",
    root: str = "s3://bucket/retort", **kubernetes: Any,
) -> list[Obj]:  # fmt: skip
    if kubernetes:
        cluster = replace(cluster, kubernetes=Kubernetes(**kubernetes))
    name, at = manifest.job_name(run, 1), "kubernetes:ctx/retort"
    return manifest.documents(made or recipe(), cluster, placement, run, root, name, at, ("eval", "export"))


def job(*arguments: Any, **options: Any) -> Obj:
    return documents(*arguments, **options)[0]


def pods(job: Obj) -> dict[str, Obj]:
    """Pod templates by role."""
    ray = job["spec"]["rayClusterSpec"]
    workers = ray["workerGroupSpecs"][0]["template"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": ray["headGroupSpec"]["template"],
        "worker": workers,
    }


def container(job: Obj, role: str = "worker") -> Obj:
    found: Obj = pods(job)[role]["spec"]["containers"][0]
    return found


def variables(job: Obj, role: str = "worker") -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(job, role)["env"]}


def workers(job: Obj) -> Obj:
    found: Obj = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


def volumes(job: Obj) -> dict[str, Obj]:
    return {volume["name"]: volume for volume in pods(job)["worker"]["spec"]["volumes"]}


# ---- golden texts


@pytest.mark.parametrize("name", names())
def test_the_manifest_of_a_recipe_is_the_golden_one(name: str) -> None:
    path = golden.path(name)
    again = "if the change is meant: .venv/bin/python -m tests.jobs.ray.golden"
    assert path.is_file(), f"{path} is missing; {again}"
    assert golden.text(name) == path.read_text(), again


def test_the_manifest_of_workers_is_one_for_kubernetes() -> None:
    made = golden.crew()
    assert [document["kind"] for document in made] == ["RayJob", "PodDisruptionBudget", "PodDisruptionBudget"]
    assert [finding for document in made for finding in schema.findings(document)] == []


def test_no_golden_manifest_outlives_its_recipe() -> None:
    assert sorted(path.stem for path in golden.FOLDER.glob("*.yaml")) == names()


def test_the_text_reads_back_as_the_documents_whatever_the_words_look_like() -> None:
    odd = {
        "A": "1e3",
        "B": "0o17",
        "C": "yes",
        "D": "12:30",
        "E": "null",
        "F": "",
        "G": "-1",
        "H": "a: b #c",
        "I": ".5",
    }
    made = documents(replace(SITE, env=odd))
    text = manifest.render(made)
    assert list(yaml.safe_load_all(text)) == made
    # as one who reads YAML 1.2, as kubectl does, would: plain words that are numbers there are not words
    plain = re.findall(r"value: (\S+)$", text, re.MULTILINE)
    assert not [word for word in plain if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?|0o[0-7]+", word)]


# ---- names


def test_names_are_what_the_operator_takes_and_of_each_submission_its_own() -> None:
    ids = ["demo-0123456789", "demo-0123456789-2", "3d-0123456789", "r-3d-0123456789", "a" * 80, "a" * 81,
           "a" * 46 + "-b", "a" * 37 + "-" * 9 + "b"]  # fmt: skip
    made = [manifest.job_name(run, attempt) for run, attempt in itertools.product(ids, (None, 1, 2, 12345))]
    assert len(set(made)) == len(made)
    for name in made:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
        assert len(name) <= 47
    assert manifest.job_name("demo-0123456789", 2) == "demo-0123456789-0002"
    assert manifest.job_name("demo-0123456789") == "demo-0123456789"


def test_a_long_run_id_is_cut_in_labels_and_whole_in_the_annotation() -> None:
    run = "dino-" * 20 + "0123456789"
    made = job(run=run)
    assert made["metadata"]["annotations"]["retort.dev/run"] == run
    for labels in (made["metadata"]["labels"], *(pod["metadata"]["labels"] for pod in pods(made).values())):
        assert all(len(value) <= 63 for value in labels.values())


# ---- what is asked for


def test_a_worker_pod_gets_what_its_ranks_need_and_ray_is_told_the_same() -> None:
    made = job()
    wanted = {"cpu": "12", "memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container(made)["resources"] == {"requests": wanted, "limits": wanted}
    group = workers(made)
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert group["rayStartParams"]["num-cpus"] == "12"
    assert group["rayStartParams"]["num-gpus"] == "2"
    assert variables(made)["OMP_NUM_THREADS"] == "3"


def test_a_run_on_cpus_asks_for_no_gpu_and_no_gpu_node() -> None:
    cluster = replace(SITE, gpus_per_node=8, gpu_type="h100")
    made = job(cluster, spread(recipe(device="cpu"), 8, 8, 6), recipe(device="cpu"))
    assert set(container(made)["resources"]["limits"]) == {"cpu", "memory"}
    assert workers(made)["rayStartParams"]["num-gpus"] == "0"
    assert "nodeSelector" not in pods(made)["worker"]["spec"]


@pytest.mark.parametrize(("least", "nodes"), [(0, 4), (1, 1), (2, 1), (3, 2), (8, 4)])
def test_an_elastic_run_may_begin_on_the_nodes_of_its_least_ranks(least: int, nodes: int) -> None:
    group = workers(job(placement=Placement(8, "cuda", 1, nodes=4), made=recipe(min_ranks=least)))
    assert (group["minReplicas"], group["replicas"]) == (nodes, 4)


def test_requests_are_limits_in_every_container() -> None:
    for pod in pods(job()).values():
        for each in pod["spec"]["containers"]:
            assert each["resources"]["requests"] == each["resources"]["limits"]
            assert each["resources"]["limits"].keys() >= {"cpu", "memory"}


def test_the_entry_point_is_told_what_the_run_is() -> None:
    words = shlex.split(job()["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.ray.entry"]
    found = vars(command.parser("entry", "job", "at", "after").parse_args(words[3:]))
    assert found == {
        "run": "demo-0123456789", "store": "s3://bucket/retort", "job": "demo-0123456789-0001", "device": "cuda",
        "ranks": 4, "threads": 3, "cpus": 6, "at": "kubernetes:ctx/retort", "after": "eval,export",
    }  # fmt: skip


def test_nothing_runs_on_the_head_but_the_entry_point() -> None:
    made = job(head_cpus=3, head_mem_gb=1.5)
    assert made["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert container(made, "head")["resources"]["limits"] == {"cpu": "3", "memory": "1536Mi"}


def test_ranks_have_the_time_to_save_that_the_recipe_grants_them() -> None:
    made = job(made=recipe(grace_s=300.5))
    for role in ("head", "worker"):
        hook = container(made, role)["lifecycle"]["preStop"]["exec"]["command"]
        assert hook == ["python", "-m", "jobs.ray.leave", "--grace", "301"]
        assert pods(made)[role]["spec"]["terminationGracePeriodSeconds"] == 361
    assert variables(made, "head")["RAY_JOB_STOP_WAIT_TIME_S"] == "361"


@pytest.mark.parametrize(
    ("deadline_h", "time_min", "limit"), [(0.0, 0, None), (2.0, 0, 7200), (0.0, 30, 1800), (1.0, 90, 3600)]
)
def test_the_shorter_of_the_recipe_s_deadline_and_the_cluster_s_limit_ends_the_job(
    deadline_h: float, time_min: int, limit: int | None
) -> None:
    made = job(replace(SITE, time_min=time_min), made=recipe(deadline_h=deadline_h))
    assert made["spec"].get("activeDeadlineSeconds") == limit


def test_a_queue_holds_the_job_until_it_is_admitted() -> None:
    made = job(queue="research", priority="high")
    labels = made["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    assert made["spec"]["suspend"] is True
    assert made["spec"]["shutdownAfterJobFinishes"] is True
    free = job()
    assert "suspend" not in free["spec"]
    assert not [key for key in free["metadata"]["labels"] if "kueue" in key]


def test_pods_go_where_the_cluster_file_says() -> None:
    tolerations = [Toleration(key="gpu", operator="Exists"), Toleration("spot", "Equal", "true", "NoExecute", 30)]
    made = job(replace(SITE, gpu_type="h100"), node_selector={"pool": "a"}, tolerations=tolerations,
               priority_class="batch", pull_secrets=["registry"], service_account="")  # fmt: skip
    assert pods(made)["worker"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "h100", "pool": "a"}
    assert "nodeSelector" not in pods(made)["head"]["spec"], "the head needs no GPU node"
    for pod in pods(made).values():
        assert pod["spec"]["tolerations"] == [
            {"operator": "Exists", "key": "gpu"},
            {"operator": "Equal", "key": "spot", "value": "true", "effect": "NoExecute", "tolerationSeconds": 30},
        ]
        assert pod["spec"]["priorityClassName"] == "batch"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["spec"]["serviceAccountName"] == "default"
        assert pod["spec"]["containers"][0]["image"] == SITE.image


def test_the_fabric_is_asked_for_by_its_resource_and_the_node_s_network_only_where_wanted() -> None:
    made = job(replace(SITE, interface="ib0"), rdma="rdma/hca", rdma_count=4, host_network=True)
    assert container(made)["resources"]["limits"]["rdma/hca"] == "4"
    assert pods(made)["worker"]["spec"]["hostNetwork"] is True
    assert pods(made)["worker"]["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert "hostNetwork" not in pods(made)["head"]["spec"]
    assert variables(made)["NCCL_SOCKET_IFNAME"] == variables(made)["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "hostNetwork" not in pods(job())["worker"]["spec"]
    assert "NCCL_SOCKET_IFNAME" not in variables(job())


def test_variables_of_the_cluster_file_win_and_none_is_there_twice() -> None:
    cluster = replace(SITE, env={"NCCL_DEBUG": "INFO", "HOME": "/tmp/me", "OMP_NUM_THREADS": "1"})
    made = job(cluster)
    assert variables(made)["HOME"] == "/tmp/me"
    assert variables(made)["OMP_NUM_THREADS"] == "1"
    assert variables(made, "head")["NCCL_DEBUG"] == "INFO"
    assert len(container(made)["env"]) == len(variables(made))


def test_folders_of_the_recipe_reach_the_ranks() -> None:
    made = job(made=replace(recipe(), loader=Loader(cache_dir="/cache/shards")))
    assert variables(made)["RETORT_CACHE"] == "/cache/shards"
    assert "RETORT_CACHE" not in variables(made, "head")


# ---- volumes


def test_shared_memory_is_a_part_of_the_pod_s_memory() -> None:
    assert volumes(job())["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert volumes(job(shm_gb=20))["shm"]["emptyDir"]["sizeLimit"] == "20Gi"
    store = int(workers(job())["rayStartParams"]["object-store-memory"])
    assert store < 1e9, "Ray's objects live there too"


def test_the_cache_holds_the_recipe_s_shards_and_checkpoints_on_their_way() -> None:
    made = replace(recipe(), loader=Loader(cache_gb=100))
    assert volumes(job(made=made))["cache"] == {"name": "cache", "emptyDir": {"sizeLimit": "150G"}}
    assert volumes(job(made=made, cache_gb=120))["cache"]["emptyDir"]["sizeLimit"] == "120G"
    kept = volumes(job(made=made, cache_path="/mnt/nvme/retort"))["cache"]
    assert kept == {"name": "cache", "hostPath": {"path": "/mnt/nvme/retort", "type": "Directory"}}
    assert variables(job())["TMPDIR"] == "/cache", "where shards and the spool are kept by default"
    assert variables(job())["RAY_TMPDIR"] == "/tmp", "Ray's sockets are to stay beside its logs"


def test_every_folder_that_is_written_to_is_a_volume() -> None:
    for role, folders in {"submitter": {"/tmp"}, "head": {"/tmp", "/dev/shm"}}.items():
        assert {mount["mountPath"] for mount in container(job(), role)["volumeMounts"]} == folders
    assert {mount["mountPath"] for mount in container(job())["volumeMounts"]} == {"/tmp", "/dev/shm", "/cache"}


# ---- what keeps it safe


@pytest.mark.parametrize("character", ["\n", "\x1b"])
def test_nothing_in_a_manifest_is_more_than_a_line(character: str) -> None:
    more = f"x{character}y"
    with pytest.raises(UserError, match="must be one line"):
        documents(replace(SITE, env={"A": more}))
    with pytest.raises(UserError, match="must be one line"):
        documents(run=f"demo-{more}")
    with pytest.raises(UserError, match="must be one line"):
        command.workers("python", ["-m", more], 2, {"CPU": 1}, 1)


def test_no_pod_has_more_rights_than_it_needs() -> None:
    for pod in pods(job(run_as=2000)).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 2000, "runAsGroup": 2000, "fsGroup": 2000,
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
    made = documents(secrets=["keys"], config_maps=["bucket"])
    for role in ("head", "worker"):
        assert container(made[0], role)["envFrom"] == [
            {"configMapRef": {"name": "bucket"}}, {"secretRef": {"name": "keys"}},
        ]  # fmt: skip
    assert "envFrom" not in container(made[0], "submitter")
    assert "value-of-" not in manifest.render(made)


def test_ray_asks_for_a_token_unless_it_is_told_not_to() -> None:
    assert job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH_MODE" not in variables(job())
    open_ = job(auth="disabled")
    assert open_["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "disabled"}
    for role in ("submitter", "head", "worker"):
        assert variables(open_, role)["RAY_AUTH_MODE"] == "disabled", "a token that lies about would switch it on"


def test_the_upkeep_of_nodes_takes_one_worker_at_a_time_and_never_the_head() -> None:
    made, *budgets = documents(placement=Placement(6, "cuda", 1, nodes=3))
    assert [(budget["kind"], budget["spec"]["minAvailable"]) for budget in budgets] == [
        ("PodDisruptionBudget", 1), ("PodDisruptionBudget", 2),
    ]  # fmt: skip
    for role, budget in zip(("head", "worker"), budgets, strict=True):
        chosen = budget["spec"]["selector"]["matchLabels"].items()
        assert [name for name, pod in pods(made).items() if chosen <= pod["metadata"]["labels"].items()] == [role]
        assert budget["metadata"]["namespace"] == made["metadata"]["namespace"]
    assert len(documents(placement=Placement(2, "cuda", 1))) == 2, "a single worker is not held back"


@pytest.mark.parametrize(
    ("cluster", "kubernetes", "made", "root", "words"),
    [(replace(SITE, image=""), {}, recipe(), "s3://b/p", "image: Kubernetes needs image"),
     (SITE, {}, recipe(), "file:///tmp/store", "store: pods do not see file:///tmp/store"),
     (SITE, {}, recipe(), "s3://b/$(id)", "goes through two shells"), (SITE, {}, recipe(), "s3://b/a b", "two shells"),
     (replace(SITE, mem_gb=0), {}, recipe(), "s3://b/p", "mem_gb: Kubernetes needs to know"),
     (SITE, {"shm_gb": 64}, recipe(), "s3://b/p", "kubernetes.shm_gb: 64 GB for /dev/shm leave nothing of the 64 GB"),
     (SITE, {"cache_gb": 100}, recipe(), "s3://b/p", "kubernetes.cache_gb: 100 GB cannot hold loader.cache_gb"),
     (SITE, {}, replace(recipe(), loader=Loader(cache_dir="/scratch")), "s3://b/p", "not /scratch")],
)  # fmt: skip
def test_what_pods_could_not_start_with_is_refused(
    cluster: Cluster, kubernetes: dict[str, Any], made: Recipe, root: str, words: str
) -> None:
    cluster = replace(cluster, kubernetes=Kubernetes(**kubernetes))
    with pytest.raises(UserError) as caught:
        manifest.check(made, cluster, FOUR, root)
    assert words in str(caught.value)
    with pytest.raises(UserError):
        documents(cluster, made=made, root=root)
