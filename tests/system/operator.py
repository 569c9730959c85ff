"""Does with a RayJob what the KubeRay operator does once its pods are up: submits its entry point, and watches it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from typing import Any

from tests.cli import REPOSITORY
from tests.kube_server import KubeServer
from tests.system.ray_cluster import RAY, RayCluster

ENDED = {"SUCCEEDED": "Complete", "FAILED": "Failed", "STOPPED": "Failed"}


class Operator:
    """Retries a job that has failed as spec.backoffLimit says, under another submission id, as on a new cluster."""

    def __init__(self, api: KubeServer, ray: RayCluster) -> None:
        self.api, self.ray = api, ray
        self.submissions: list[str] = []

    def __call__(self, job: dict[str, Any]) -> None:
        name, tries = job["metadata"]["name"], job["spec"]["backoffLimit"] + 1
        for number in range(1, tries + 1):
            status = self._run(name, job["spec"], f"{name}-{number}")
            last = status == "SUCCEEDED" or number == tries
            self._tell(name, status, ENDED[status] if last else "Retrying", failed=number - (status == "SUCCEEDED"))
            if last:
                return

    def _run(self, name: str, spec: dict[str, Any], submission: str) -> str:
        self._tell(name, "", "Initializing")
        # What the image would have; the rest of the environment is that of the pods, here of the nodes.
        code = json.dumps({"env_vars": {"PYTHONPATH": str(REPOSITORY)}})
        words = (
            "--submission-id",
            submission,
            "--no-wait",
            "--runtime-env-json",
            code,
            "--",
            *spec["entrypoint"].split(),
        )
        while not self._submit(*words):
            time.sleep(2.0)  # as the submitter's own retries do: a head that has just started takes no jobs yet
        self.submissions.append(submission)
        status = ""
        while status not in ENDED and not self.api.stopped.is_set():
            with suppress(OSError):  # the head is busy: asked again in a second
                status = self.ray.ask(f"/api/jobs/{submission}")["status"]
            if status not in ENDED:
                self._tell(name, status, "Running")
            time.sleep(1.0)
        return status

    def _tell(self, name: str, status: str, deployment: str, failed: int = 0) -> None:
        told = {"jobStatus": status, "jobDeploymentStatus": deployment, "failed": failed}
        self.api.change("rayjobs", name, {"status": told})

    def _submit(self, *words: str) -> bool:
        done = subprocess.run([RAY, "job", "submit", "--address", self.ray.address, *words], capture_output=True,
                              text=True, env={**os.environ, **self.ray.env}, timeout=120)  # fmt: skip
        print(f"$ ray job submit {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done.returncode == 0 or self.api.stopped.is_set()
