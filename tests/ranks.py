"""Several ranks on this machine in well under a second each: processes forked from a server that has imported torch."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

PRELOAD = ["torch", "timm", "deepspeed", "torch._dynamo", "torch._inductor.compile_fx", "core.train", "tests.ranks"]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank(
    function: Callable[..., Any], rank: int, world: int, port: int, env: dict[str, str], args: Any, queue: Any
) -> None:
    os.environ.update(env, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu")  # fmt: skip
    import torch

    from core import engine

    torch.set_num_threads(1)
    try:
        engine.init_distributed(torch.device("cpu"))
        queue.put((rank, True, function(*args)))
        engine.shutdown()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 180) -> list[Any]:
    """Call a module-level function on `world` gloo ranks; its results in rank order, or any rank's failure."""
    queue, port = _CONTEXT.Queue(), free_port()
    env = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "RETORT_"))}
    processes = [
        _CONTEXT.Process(target=_rank, args=(function, r, world, port, env, args, queue)) for r in range(world)
    ]
    for process in processes:
        process.start()
    try:
        results = {}
        for _ in processes:
            rank, ok, value = queue.get(timeout=timeout_s)
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        for process in processes:
            process.join(timeout_s)
        return [results[r] for r in range(world)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
