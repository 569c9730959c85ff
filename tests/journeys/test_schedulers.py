"""What the command line does for SLURM and Ray up to the point where a scheduler would take over."""

from __future__ import annotations

import subprocess
from pathlib import Path

from jobs.record import Run, State
from tests.cli import REPOSITORY, Shell, run_id
from tests.kube_server import KubeServer
from tests.toy_run import SHORT, SMOKE


def test_without_slurm_s_programs_the_message_says_where_to_submit(tmp_path: Path) -> None:
    shell = Shell(tmp_path, RETORT_STORE=f"file://{tmp_path}/store", PATH="/nowhere")
    out = shell("submit", "demo", *SMOKE, SHORT, "--launcher", "slurm", code=3)
    assert "there is no sinfo on this machine: submit from a login node of the cluster" in out
    assert not list(Run.list(f"file://{tmp_path}/store"))


def test_a_script_for_slurm_is_rendered_for_a_recipe_and_is_sound(tmp_path: Path) -> None:
    shell = Shell(tmp_path, RETORT_STORE=f"file://{tmp_path}/store")
    out = shell("manifests", "demo", *SMOKE, SHORT, "--launcher", "slurm")
    path = Path(out.splitlines()[-3])
    try:
        assert run_id(out).startswith("demo-")
        assert path.parent == REPOSITORY / "slurm" / "out"
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert f"# Trains {run_id(out)}." in path.read_text()
        assert "state     created" in shell.type(out, "status")["status"]
    finally:
        path.unlink()


def test_a_ray_cluster_that_does_not_answer_is_told_before_anything_is_queued(tmp_path: Path) -> None:
    shell = Shell(tmp_path, RETORT_STORE=f"file://{tmp_path}/store", RAY_ADDRESS="http://127.0.0.1:9")
    out = shell("submit", "demo", *SMOKE, SHORT, "--launcher", "ray", "--dirty", code=3)
    assert "no Ray cluster answers at http://127.0.0.1:9" in out
    assert not list(Run.list(f"file://{tmp_path}/store"))


def test_a_rayjob_that_waits_says_for_what_and_can_be_cancelled(tmp_path: Path, bucket: str, api: KubeServer) -> None:
    env = {"RETORT_STORE": bucket, "RETORT_CLUSTER": str(tmp_path / "ml.yaml"), "KUBECONFIG": str(api.kubeconfig)}
    shell = Shell(tmp_path, **env)
    submitted = shell("submit", "demo", *SMOKE, SHORT, "--launcher", "ray", "--dirty", "--detach")
    name = run_id(submitted)
    [job] = api.objects("rayjobs")
    assert f"--run {name} " in job["spec"]["entrypoint"]
    api.change("rayjobs", job["metadata"]["name"], {"status": {"jobDeploymentStatus": "Initializing"}})
    again = shell("submit", "demo", *SMOKE, SHORT, "--launcher", "ray", "--dirty")
    assert f"{name} is already queued" in again
    assert "is Initializing" in again
    assert len(api.objects("poddisruptionbudgets")) == 2  # of the head and of the workers
    shell.type(submitted, "status", "logs", "cancel")
    assert not api.objects("rayjobs")
    assert not api.objects("poddisruptionbudgets")
    assert Run(bucket, name).last().state == State.CANCELLED
