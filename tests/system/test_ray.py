"""Runs on a real Ray cluster of two nodes: job submission, Ray Train, and every way in which its parts can be lost."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from jobs import process
from jobs.ray import leave
from jobs.record import Run, State
from tests.cli import Shell, run_id, wait_for
from tests.kube_server import KubeServer
from tests.system.operator import Operator
from tests.system.ray_cluster import RayCluster
from tests.system.stored_features import FeatureSite
from tests.toy_run import LONG, SHORT, SMOKE, losses

pytestmark = pytest.mark.system


class Site:
    """A user's folder, the bucket that their runs go to, and the Ray cluster that they submit to."""

    def __init__(self, folder: Path, ray: RayCluster, root: str) -> None:
        self.root, self.ray = root, ray
        self.shell = Shell(folder, RETORT_STORE=root, RETORT_CLUSTER="", **ray.env)

    def submit(self, *arguments: str, steps: str = SHORT, code: int = 0) -> str:
        return self.shell("submit", "demo", *SMOKE, steps, "--launcher", "ray", "--dirty", *arguments, code=code)

    def run(self, name: str) -> Run:
        return Run(self.root, name)

    def ranks(self, name: str) -> list[psutil.Process]:
        found = process.running("jobs.worker", "--run", name, "--store", self.root)
        return sorted(found, key=lambda each: each.environ()["RANK"])

    def works(self, name: str) -> bool:
        """Whether anything of the run is left on the cluster: its job's entry point, or a rank."""
        return bool(process.running("jobs.ray.entry", "--run", name, "--store", self.root) or self.ranks(name))

    def trains(self, name: str, attempt: int) -> None:
        """Wait until this attempt has made some steps."""

        def working() -> bool:
            beat = self.run(name).view().heartbeat
            return bool(beat.get("attempt") == attempt and beat.get("step"))

        wait_for(f"attempt {attempt} at work", working, poll_s=1.0)

    def ends(self, name: str, state: State = State.SUCCEEDED) -> None:
        wait_for(f"{name} {state}", lambda: self.run(name).last().state == state, poll_s=1.0)


@pytest.fixture
def site(tmp_path: Path, ray: RayCluster, bucket: str) -> Site:
    return Site(tmp_path, ray, bucket)


def test_a_run_goes_through_the_loss_of_each_of_its_parts_and_computes_the_same(
    site: Site, whole: dict[int, float]
) -> None:
    policy = "launch.max_attempts=9 launch.backoff_s=0.1 launch.min_ranks=1 launch.gather_s=10"
    name = run_id(site.submit("--detach", steps=f"{LONG} {policy}"))

    site.trains(name, 1)
    shown = site.shell("status", name)
    job = site.run(name).handle(site.run(name).last())["job"]
    assert f"Ray job {job} is RUNNING at {site.ray.address}" in shown
    assert re.search(r"progress .*step \d+/320, loss .* img/s.* ETA", shown)
    assert len({rank.environ()["RETORT_NODE"] for rank in site.ranks(name)}) == 2  # on two nodes
    site.ranks(name)[1].parent().kill()  # the Ray worker that keeps rank 1
    site.trains(name, 2)
    site.ray.raylet(2).kill()
    site.trains(name, 3)  # with one rank
    assert len(site.ranks(name)) == 1
    site.ray.kill(2)
    site.ray.start(2)
    site.ranks(name)[0].kill()
    site.trains(name, 4)  # with two again
    site.ray.stop()
    site.ray.start(1)
    site.ray.start(2)
    wait_for("the record to know", lambda: site.run(name).view().lost)
    site.shell("resume", name, "--launcher", "ray", "--dirty")

    cut = [t for t in site.run(name).transitions() if t.state in (State.FAILED, State.PREEMPTED)]
    words = ["rank 1: its Ray worker or node was lost", "lost", "rank 0: killed by SIGKILL", "lost: "]
    for t, word in zip(cut, words, strict=True):
        assert word in t.info["reason"]
    found = losses(site.root, name)
    assert found.keys() == whole.keys()
    assert max(abs(found[step] - whole[step]) for step in whole) < 1e-5


@pytest.fixture
def kubernetes(site: Site, api: KubeServer, tmp_path: Path) -> Shell:
    """A user with a kube context and no RAY_ADDRESS."""
    env = {"RETORT_STORE": site.root, "RETORT_CLUSTER": str(tmp_path / "ml.yaml"), "KUBECONFIG": str(api.kubeconfig)}
    return Shell(tmp_path, **env)


def test_a_rayjob_trains_and_a_retry_on_a_new_cluster_goes_on(
    site: Site, api: KubeServer, kubernetes: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.on_create = operator = Operator(api, site.ray)
    steps = SHORT.replace("train.steps=40", "train.steps=240") + " launch.ranks=2 launch.backoff_s=0.1"
    submit = ("submit", "demo", *SMOKE, steps, "--launcher", "ray", "--dirty", "--detach", "--after", "export")
    name = run_id(kubernetes(*submit))
    site.trains(name, 1)
    [job] = api.objects("rayjobs")
    handle = site.run(name).handle(site.run(name).last())
    assert handle["job"] == job["metadata"]["name"]
    assert f"RayJob {handle['job']}" in kubernetes("status", name)
    wait_for("a checkpoint", lambda: kubernetes.status(name)["checkpoints"])
    process.running("jobs.ray.attempt")[0].kill()  # the driver of Ray Train
    site.trains(name, 2)
    running = process.running  # a pod has no processes but its own; here other tests' are beside them
    in_this_pod = lambda module: [p for p in running(module) if any(site.root in word for word in p.cmdline())]  # noqa: E731
    with monkeypatch.context() as pod:
        pod.setattr(leave.process, "running", in_this_pod)
        assert leave.main(["--grace", "60"]) == 0  # the head's pod is evicted, and its cluster goes with it
    assert "the process that drives the attempt: killed by SIGKILL" in kubernetes("status", name)
    site.ends(name)
    wait_for("the job's end", lambda: api.objects("rayjobs")[0]["status"]["jobDeploymentStatus"] == "Complete")
    assert operator.submissions == [f"{handle['job']}-1", f"{handle['job']}-2"]
    states = [str(t.state) for t in site.run(name).transitions()]
    cut = ["queued", "running"]
    assert states == ["created", *cut, "failed", *cut, "preempted", *cut, "succeeded"]
    assert "rank 1 of 2" in kubernetes("logs", name)
    assert list(losses(site.root, name)) == list(range(1, 241))
    assert site.run(name).store.size("export/model.safetensors")  # AFTER=export, on a worker


def test_a_cluster_that_cannot_be_had_is_told_before_anything_is_queued(site: Site, tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("cpus_per_task: 2")
    large = site.submit("--cluster", str(tmp_path / "large.yaml"), code=2)
    assert f"ranks of 2 CPUs are wanted; the Ray cluster at {site.ray.address} has room for 0" in large
    site.shell.env["RAY_AUTH_TOKEN"] = "0" * 32
    assert "RAY_AUTH_TOKEN" in site.submit(code=3)
    site.shell.env["RAY_ADDRESS"] = "http://127.0.0.1:9"
    assert "no Ray cluster answers at http://127.0.0.1:9" in site.submit(code=3)
    assert not list(Run.list(site.root))


def test_a_run_is_cancelled_at_work_and_while_it_waits_for_nodes(site: Site) -> None:
    name = run_id(site.submit("--detach", steps=f"{LONG} launch.ranks=2"))
    site.trains(name, 1)
    assert "its ranks save and end" in site.shell("cancel", name)
    wait_for("the end", lambda: not site.works(name))
    saved = site.shell.status(name)["checkpoints"]
    assert saved  # by the ranks, before they left
    site.shell("resume", name, "--launcher", "ray", "--dirty", "--detach")
    site.ray.kill(2)
    waits = "waiting for nodes for 2 ranks of 1 CPU; the Ray cluster has room for 1"
    wait_for("a word", lambda: waits in site.shell("status", name))
    site.shell("cancel", name)
    wait_for("the end", lambda: not site.works(name))
    assert site.run(name).last().state == State.CANCELLED


# ---- teacher outputs


def test_a_rayjob_of_workers_stores_what_is_wanted(
    tmp_path: Path, ray: RayCluster, bucket: str, api: KubeServer
) -> None:
    api.on_create = Operator(api, ray)
    own = {"KUBECONFIG": str(api.kubeconfig), "RETORT_CLUSTER": str(tmp_path / "ml.yaml")}
    site = FeatureSite(tmp_path, bucket, own)
    out = site.features("--launcher", "ray", "--nproc", "2", "--dirty")
    kubectl = "kubectl --context=toy --namespace=ml"
    job = re.search(rf"RayJob (demo-workers-\w+): 2 workers of 1 CPU; {kubectl} get rayjob \1 ", out)
    assert job
    ended = lambda: api.objects("rayjobs")[0].get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")  # noqa: E731
    wait_for("the RayJob's end", ended, 300, poll_s=1.0)
    [made] = api.objects("rayjobs")
    assert made["metadata"]["name"] == job[1]
    assert made["status"] == {"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete", "failed": 0}
    site.is_whole()


def test_tasks_of_a_ray_cluster_share_the_work_though_a_node_is_lost(
    tmp_path: Path, ray: RayCluster, bucket: str
) -> None:
    site = FeatureSite(tmp_path, bucket, ray.env)
    out = site.features("--launcher", "ray", "--nproc", "2", "--dirty")
    job = re.search(r"Ray job (demo-workers-\w+): 2 workers of 1 CPU; ray job logs --follow \1", out)
    assert job
    site.begun()
    ray.kill(2)
    status = lambda: ray.ask(f"/api/jobs/{job[1]}")["status"]  # noqa: E731
    wait_for("the job's end", lambda: status() in ("SUCCEEDED", "FAILED", "STOPPED"), 500, poll_s=2.0)
    assert status() == "SUCCEEDED", ray.ask(f"/api/jobs/{job[1]}/logs")
    site.is_whole()
