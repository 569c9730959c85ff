"""A user who stores teacher outputs by the workers of a scheduler, and what must be there in the end."""

from __future__ import annotations

import re
from pathlib import Path

from core.storage import open_store
from tests.cli import Shell, wait_for
from tests.toy_run import RANDOM

VIEWS = 4
COMMAND = ("features", "demo", "--profile", "smoke", "--set", RANDOM, "--split", "train", "--views", str(VIEWS))


class FeatureSite:
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
