"""The schemas of KubeRay and Kueue, and kustomize, where they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import schema

FOLDER = Path(__file__).parents[2] / "k8s"
Objs = list[dict[str, Any]]


@pytest.fixture(scope="session")
def crds() -> None:
    """For tests against schemas that are not part of this project."""
    if not schema.crds():
        pytest.skip(schema.MISSING)


@pytest.fixture(scope="session")
def overlay() -> Callable[[str], Objs]:
    """overlay(name): its objects, as kubectl would apply them."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here")
    said = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, timeout=60).stdout
    version = json.loads(said).get("kustomizeVersion", "")
    if not re.match(r"v([5-9]|\d\d)", version):
        pytest.skip(f"kubectl's kustomize is {version or 'old'}; the overlays need version 5, of kubectl 1.27")

    @cache
    def render(name: str) -> Objs:
        command = ["kubectl", "kustomize", str(FOLDER / "overlays" / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return render
