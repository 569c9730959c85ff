"""The processes of one attempt on this machine: started together, watched as they end, ended together."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jobs.launchers.ending import Exit
from jobs.launchers.fork_server import Forked, ForkServer
from jobs.placement import Placement
from jobs.ranks_env import FILE
from jobs.spec import imports


class Ranks:
    """One process per rank; its standard output and error go to `folder`/rank-NNNN.log."""

    def __init__(self, server: ForkServer, command: Sequence[str], placement: Placement, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        self._processes: list[Forked] = []
        self._meeting = Path(tempfile.mkdtemp(prefix="retort-ranks-"))  # which only this user may enter
        for rank in range(placement.ranks):
            self.log(rank).touch()  # whoever looks for it finds it before the rank has opened it
            child = server.start(command, rank_environment(rank, placement, self._meeting / "store"), self.log(rank))
            self._processes.append(child)
            threading.Thread(target=self._wait, args=(rank, child), daemon=True).start()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04d}.log"

    def next_exit(self, timeout_s: float) -> Exit | None:
        """The next rank that ended, in the order in which they did."""
        with suppress(queue.Empty):
            return self._exits.get(timeout=timeout_s)
        return None

    def drain(self, seconds: float) -> list[Exit]:
        """Ranks that end within so long."""
        found, limit = [], time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            if ended := self.next_exit(left):
                found.append(ended)
        return found

    def signal(self, signum: int) -> None:
        for child in self._processes:
            child.signal(signum)

    def kill(self) -> None:
        """End the ranks and what they started, at once."""
        for child in self._processes:
            child.kill()
        shutil.rmtree(self._meeting, ignore_errors=True)

    def end(self, grace_s: float) -> None:
        """Ask the ranks that are left to end, and make them after `grace_s`."""
        self.signal(signal.SIGTERM)
        limit = time.monotonic() + grace_s
        for child in self._processes:
            child.wait(max(0.0, limit - time.monotonic()))
        self.kill()

    def _wait(self, rank: int, child: Forked) -> None:
        self._exits.put(Exit(rank, child.reap()))


def common_environment(placement: Placement) -> dict[str, str]:
    """What all ranks see alike: this process's own environment and what is read while packages are imported."""
    own = {
        "WORLD_SIZE": placement.ranks,
        "LOCAL_WORLD_SIZE": placement.ranks,
        "OMP_NUM_THREADS": placement.threads,
        "DS_ACCELERATOR": placement.device,  # or DeepSpeed would ask CUDA, behind which no process may be forked
        "PYTHONUNBUFFERED": 1,
    }
    return {**os.environ, **imports(), **{name: str(value) for name, value in own.items()}}


def rank_environment(rank: int, placement: Placement, meeting: Path) -> dict[str, str]:
    """Environment of one rank: what is common to all, its number, and the file in which ranks meet."""
    own = {"RANK": rank, "LOCAL_RANK": rank, FILE: meeting}
    return {**common_environment(placement), **{name: str(value) for name, value in own.items()}}
