"""Workers as tasks of a Ray cluster: a task's process, and ways that do not lead to one."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import load
from jobs.cluster import Cluster
from jobs.errors import UserError
from jobs.launchers.ray import Ray
from jobs.placement import Placement
from jobs.ray import workers
from jobs.ray.kubernetes import OnKubernetes
from tests.kube_server import KubeServer


def test_a_task_is_a_process_with_its_threads_and_its_code(tmp_path: Path) -> None:
    out = tmp_path / "threads"
    script = f"import os, pathlib, sys, jobs; pathlib.Path({str(out)!r}).write_text(os.environ['OMP_NUM_THREADS'])"
    assert workers.work(["-c", f"{script}; sys.exit(3)"], 5) == 3
    assert out.read_text() == "5"


def test_a_worker_that_was_killed_is_told_apart_from_one_that_failed() -> None:
    with pytest.raises(workers.Killed, match="killed by SIGKILL"):
        workers.work(["-c", "import os; os.kill(os.getpid(), 9)"], 1)


def test_on_kubernetes_it_is_said_how_to_get_workers(server: KubeServer, tiny_recipe: Path) -> None:
    assert server
    here = Ray()._here()
    assert isinstance(here, OnKubernetes)
    with pytest.raises(UserError, match="RAY_ADDRESS=http://127.0.0.1:8265"):
        Ray(Cluster()).workers(["-m", "jobs.extract"], 2, load(str(tiny_recipe)), Placement(1, "cpu", 1))
