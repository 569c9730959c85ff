"""Workers as tasks of a Ray cluster: a task's process, and ways that do not lead to one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from core.config import load
from jobs.cluster import Cluster
from jobs.errors import BUG, OK
from jobs.launchers.ray import Ray
from jobs.placement import Placement
from jobs.ray import workers
from jobs.ray.site import Kubernetes
from tests.kube_server import KubeServer


def test_a_task_is_a_process_with_its_threads_and_its_code(tmp_path: Path) -> None:
    out = tmp_path / "threads"
    script = f"import os, pathlib, sys, jobs; pathlib.Path({str(out)!r}).write_text(os.environ['OMP_NUM_THREADS'])"
    assert workers.work(["-c", f"{script}; sys.exit(3)"], 5) == 3
    assert out.read_text() == "5"


def test_a_worker_that_was_killed_is_told_apart_from_one_that_failed() -> None:
    with pytest.raises(workers.Killed, match="killed by SIGKILL"):
        workers.work(["-c", "import os; os.kill(os.getpid(), 9)"], 1)


def test_a_worker_that_was_asked_to_leave_stays_until_its_node_goes_and_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(workers.Killed, match="asked to leave"):
        workers.work(["-c", "import signal, sys; sys.exit(128 + signal.SIGTERM)"], 1)
    assert waits == [workers.GOING_S]


@pytest.mark.parametrize(
    ("codes", "retried", "code"),
    [((0, 2), False, OK), ((2, 3), False, 3), ((2, None), False, 2), ((None,), False, BUG), ((), False, BUG),
     ((2, 1), True, OK), ((2, 3), True, 3), ((2, None), True, 2), ((75,), True, 75), ((), True, BUG),
     ((0, None), True, OK)],
)  # fmt: skip
def test_a_job_fails_where_another_try_may_do_better(codes: tuple[int | None, ...], retried: bool, code: int) -> None:
    assert workers.verdict(codes, retried) == code


def test_on_kubernetes_workers_are_a_rayjob_of_their_own(server: KubeServer, tiny_recipe: Path) -> None:
    cluster = Cluster(image="registry.example.org/retort:1", gpus_per_node=2, cpus_per_task=6, mem_gb=64,
                      kubernetes=Kubernetes(namespace="ml"))  # fmt: skip
    recipe, arguments = load(str(tiny_recipe), dotlist=["launch.deadline_h=1"]), ["-m", "jobs.extract", "--order", "o1"]
    said = Ray(cluster).workers(arguments, 5, recipe, Placement(1, "cuda", 3))
    [job], name = server.objects("rayjobs"), f"{recipe.name}-workers-"
    assert job["metadata"]["name"].startswith(name)
    assert f"RayJob {job['metadata']['name']}: 5 workers of 6 CPUs and 1 GPU; kubectl" in said
    assert f"kubectl --context=toy --namespace=ml delete rayjob {job['metadata']['name']}" in said
    words = "--count 5 --cpus 6.0 --gpus 1.0 --threads 3 --retried -- -m jobs.extract --order o1"
    assert job["spec"]["entrypoint"] == f"python -m jobs.ray.workers {words}"
    assert "activeDeadlineSeconds" not in job["spec"], "the recipe's deadline is of the run"
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]["num-gpus"]) == (3, "2")
    assert len(server.objects("poddisruptionbudgets")) == 2
