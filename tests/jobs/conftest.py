"""Fixtures of the job tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from PIL import Image

from core import machine
from core.small_json import Unreadable
from jobs.record import Run
from jobs.settings import Settings

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


def fake_worker(deed: str) -> list[str]:
    """Command of a rank that does `deed` of tests/jobs/fake_worker.py."""
    return [sys.executable, str(FAKE_WORKER), deed]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No option of the shell or the make that runs the tests reaches a command under test."""
    for name in [*(n.upper() for n in Settings.__dataclass_fields__), "RETORT_STORE", *machine.FIELDS]:
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_ADDRESS", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no kube context of the person who runs the tests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An empty store."""
    return f"file://{tmp_path}/store"


@pytest.fixture
def new_run(root: str) -> Iterator[Callable[..., Run]]:
    """Makes runs; ends supervisors that a failed test has left."""
    made: list[Run] = []

    def make(run_id: str = "demo-0123456789", recipe: str = "") -> Run:
        run = Run(root, run_id)
        run.create(recipe, {"id": run_id})
        made.append(run)
        return run

    yield make
    for run in made:
        with suppress(Unreadable):
            if run.exists():
                end_supervisor(run)


def end_supervisor(run: Run) -> None:
    """Kill what may still work on a run: the supervisor's session."""
    pid = run.handle(run.last()).get("pid")
    for entry in Path("/proc").iterdir():
        if type(pid) is int and pid > 1 and entry.name.isdigit():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == pid:
                    os.kill(int(entry.name), 9)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four readable images in two classes."""
    for i in range(4):
        folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48 + i, 40), (60 * i, 100, 20)).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def tiny_recipe(tmp_path: Path, photos: Path) -> Path:
    """A recipe that needs nothing but a folder of images: a tiny student of a tiny untrained teacher."""
    vit = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 2}}
    content = {
        "method": {"name": "unic", "options": {"hidden": 32, "last_hidden": 64, "drop": 0.0}},
        "student": vit,
        "teachers": {"big": {**vit, "weights": "random"}},
        "data": {"source": f"file://{photos}"},
        "train": {"img_size": 32, "steps": 1, "batch": 4, "micro_batch": 2, "precision": "fp32"},
        "launch": {"device": "cpu", "ranks": 2, "max_attempts": 1},
        "loader": {"workers": 0},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
