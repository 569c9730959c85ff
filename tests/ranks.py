"""Several ranks on this machine in well under a second each: processes forked from a server that has imported torch."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = [
    "torch",
    "timm",
    "deepspeed",
    "torch._dynamo",
    "core.train",
    "core.bucket",
    "tests.ranks",
]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank(
    function: Callable[..., Any], rank: int, world: int, meeting: str, env: dict[str, str], args: Any,
    answer: Connection,
) -> None:  # fmt: skip
    os.environ.update(env, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu",
                      GLOO_SOCKET_IFNAME="lo")  # fmt: skip
    import torch
    from torch.distributed import FileStore

    from core import engine

    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # as in ranks that a launcher has started: loaders' processes are forked
    try:
        engine.init_distributed(torch.device("cpu"), FileStore(f"{meeting}/store", world))
        result = True, function(*args)
        answer.send_bytes(pickle.dumps(result))  # a copy: shared tensors would go with this process
        engine.shutdown()
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise


class Ranks:
    """`world` gloo ranks, each calling a module-level function; they can be signalled while they work."""

    def __init__(self, function: Callable[..., Any], world: int, *args: Any) -> None:
        self._meeting = tempfile.TemporaryDirectory(prefix="ranks-")
        env = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "RETORT_"))}
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world)]
        self._answers = [ours for ours, _ in pipes]
        self.processes = [
            _CONTEXT.Process(target=_rank, args=(function, r, world, self._meeting.name, env, args, theirs))
            for r, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def signal(self, rank: int, signum: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signum)

    def results(self, timeout_s: float = 180) -> list[Any]:
        """In rank order.  Raises AssertionError with any rank's failure; ends the ranks in every case."""
        limit = time.monotonic() + timeout_s
        try:
            found = []
            for rank, answer in enumerate(self._answers):
                if not answer.poll(max(limit - time.monotonic(), 0.0)):
                    raise AssertionError(f"rank {rank} has not answered in {timeout_s} s")
                try:
                    ok, value = pickle.loads(answer.recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} ended without an answer") from None
                if not ok:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                found.append(value)
            for process in self.processes:
                process.join(max(limit - time.monotonic(), 0.0))
            return found
        finally:
            self.end()

    def wait_dead(self, rank: int, timeout_s: float = 180) -> None:
        """Until this rank has ended by itself; then end the others, which wait for it in vain."""
        self.processes[rank].join(timeout_s)
        assert not self.processes[rank].is_alive(), f"rank {rank} still lives"
        self.end()

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 180) -> list[Any]:
    """Call a module-level function on `world` gloo ranks; its results in rank order, or any rank's failure."""
    return Ranks(function, world, *args).results(timeout_s)
