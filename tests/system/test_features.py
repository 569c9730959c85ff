"""Teacher outputs stored by the workers of a real SLURM and of a real Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.storage import open_store
from tests.cli import Shell, wait_for
from tests.conftest import Slurm
from tests.kube_server import KubeServer
from tests.system.operator import Operator
from tests.system.ray_cluster import RayCluster
from tests.toy_run import RANDOM

pytestmark = pytest.mark.system
VIEWS = 4
COMMAND = ("features", "demo", "--profile", "smoke", "--set", RANDOM, "--split", "train", "--views", str(VIEWS))


class Site:
    """A user's folder and the store that their features go to."""

    def __init__(self, folder: Path, root: str, env: dict[str, str]) -> None:
        self.root, self.shell = root, Shell(folder, **{"RETORT_STORE": root, "RETORT_CLUSTER": "", **env})

    def features(self, *arguments: str, code: int = 0) -> str:
        return self.shell(*COMMAND, *arguments, code=code)

    def begun(self) -> None:
        """Wait until some part is stored."""
        wait_for("the first part", lambda: any("/view-" in e.key for e in open_store(self.root).list("features/")))

    def is_whole(self) -> None:
        """Everything is there and sound, and nothing of the work is left behind."""
        out = self.features("--verify")
        assert "all that is stored is sound" in out
        found = re.search(r"(\d+) of (\d+) parts are there", out)
        assert found
        assert found[1] == found[2]
        assert int(found[2]) >= 2 * VIEWS
        left = [entry.key for entry in open_store(self.root).list("features/")]
        assert len([key for key in left if key.endswith("/index.json")]) == 2 * VIEWS
        assert len([key for key in left if key.endswith(".safetensors")]) == 2 * int(found[2])
        assert not [key for key in left if "/work/" in key]


def test_tasks_of_a_slurm_array_share_the_work_though_one_is_preempted_and_one_is_killed(
    tmp_path: Path, slurm: Slurm
) -> None:
    site = Site(tmp_path, f"file://{tmp_path}/store", slurm.env)
    out = site.features("--launcher", "slurm", "--nproc", "3")
    job = re.search(r"SLURM job (\d+): 3 workers; squeue --jobs=\1 shows them, scancel \1 ends them", out)
    assert job
    site.begun()
    slurm.run("scontrol", "requeue", f"{job[1]}_0")
    slurm.run("scancel", "--signal=USR2", f"{job[1]}_1")  # as its time limit does: it starts itself again
    slurm.run("scancel", f"{job[1]}_2")
    wait_for("the array's end", lambda: not slurm.run("squeue", "--noheader", f"--jobs={job[1]}"), 400)
    wait_for("accounting", lambda: _ends(slurm, job[1]) == {"0": "COMPLETED", "1": "COMPLETED", "2": "CANCELLED"})
    site.is_whole()


def _ends(slurm: Slurm, job: str) -> dict[str, str]:
    """How the tasks of an array ended in the end."""
    out = slurm.run("sacct", "-X", "-n", "-P", f"--jobs={job}", "--format=JobID,State")
    found = (re.match(r"\d+_(\d+)\|(\w+)", line) for line in out.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_a_rayjob_of_workers_stores_what_is_wanted(
    tmp_path: Path, ray: RayCluster, bucket: str, api: KubeServer
) -> None:
    api.on_create = Operator(api, ray)
    own = {"KUBECONFIG": str(api.kubeconfig), "RETORT_CLUSTER": str(tmp_path / "ml.yaml")}
    site = Site(tmp_path, bucket, own)
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
    site = Site(tmp_path, bucket, ray.env)
    out = site.features("--launcher", "ray", "--nproc", "2", "--dirty")
    job = re.search(r"Ray job (demo-workers-\w+): 2 workers of 1 CPU; ray job logs --follow \1", out)
    assert job
    site.begun()
    ray.kill(2)
    status = lambda: ray.ask(f"/api/jobs/{job[1]}")["status"]  # noqa: E731
    wait_for("the job's end", lambda: status() in ("SUCCEEDED", "FAILED", "STOPPED"), 500, poll_s=2.0)
    assert status() == "SUCCEEDED", ray.ask(f"/api/jobs/{job[1]}/logs")
    site.is_whole()
