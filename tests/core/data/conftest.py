from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary directory, where scans of tars are kept, of this test alone."""
    (tmp_path / "scans").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scans"))
    return tmp_path / "scans"
