"""Fixtures of the tests of stored teacher outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import toy

ROWS = 8  # of a part


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as a real data set would have."""
    for name in ("DENSE_ROWS", "GLOBAL_ROWS"):
        monkeypatch.setattr(f"core.features.work.{name}", ROWS)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A store with the toy data."""
    return toy.store(tmp_path)
