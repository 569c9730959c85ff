"""One attempt of a run: waits for nodes, then has Ray Train start and watch the ranks. A process of its own.

`python -m jobs.ray.attempt --run ID --store URI --attempt N --said FILE ...`, started by jobs.ray.entry. Ray Train is
told never to restart anything itself: which attempt comes next, and from where, is decided by the run's record.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.storage import StoreError
from jobs.errors import NOT_READY, OK, PREEMPTED, code_of, describe, redact
from jobs.launchers.ending import Exit, order
from jobs.placement import allowed_ranks, demand, fits
from jobs.ray import command, node
from jobs.record import Run

POLL_S = 2.0
TELL_S = 15.0  # between two words on what is waited for
LONGEST = 400  # characters of Ray's explanations
STARTS = 5  # that may come to nothing, in one attempt
START_S = "20"  # in which Ray is to find the room that it said there is: a node that has just died may have had it


def main(arguments: list[str]) -> int:
    options = command.parser("jobs.ray.attempt", "attempt", "said").parse_args(arguments)
    from ray.exceptions import RayError

    try:
        failure, why = train(options)
    except (RayError, ConnectionError) as error:  # the controller of Ray Train or the head was lost, say
        failure, why = Exit(-1, NOT_READY), f"Ray: {said(error)}"
    except Exception as error:
        failure, why = Exit(-1, code_of(error)), describe(error)
    if failure:
        Path(options.said).write_text(json.dumps({"rank": failure.rank, "code": failure.code, "why": why}))
    return OK


def train(options: Any) -> tuple[Exit | None, str]:
    """The rank that ended the attempt before its time, and what is known of that; (None, "") when none did."""
    os.environ |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_S, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    import ray

    run = Run(options.store, options.run)
    recipe, each = run.recipe(), demand(options.device, options.cpus)
    ray.init(address="auto", log_to_driver=False)
    least = min(recipe.launch.min_ranks or options.ranks, options.ranks)
    allowed = [n for n in allowed_ranks(recipe) if least <= n <= options.ranks]
    about = {"run": run.id, "store": run.root, "attempt": options.attempt, "start": uuid.uuid4().hex,
             "device": options.device, "threads": options.threads, "grace_s": recipe.launch.grace_s}  # fmt: skip
    why = ""
    for _ in range(STARTS):
        ranks = gather(run, options.attempt, allowed, each, recipe.launch.gather_s)
        print(f"attempt {options.attempt}: {ranks} ranks of {command.told(each)}", flush=True)
        try:
            return fit(about, ranks, each)
        except NotStarted as error:
            why = f"Ray did not start {ranks} ranks of {command.told(each)}, {STARTS} times: {error}"
            print(f"not started: {error}", flush=True)
    return Exit(-1, NOT_READY), why


class NotStarted(Exception):  # noqa: N818 - an event, not a fault of this code
    """The room for the ranks has gone, or what Ray began there died, before they could start."""


def gather(run: Run, attempt: int, allowed: Sequence[int], each: dict[str, float], patience_s: float) -> int:
    """Wait until nodes have room for the largest allowed number of ranks, or, after a while, for a smaller one."""
    import ray

    signal.signal(signal.SIGTERM, _leave)  # Ray sets one of its own
    began, spoke = time.monotonic(), float("-inf")
    while True:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        room = min(sum(fits(resources, each) for resources in nodes()), fits(free, each))
        found = max((n for n in allowed if n <= room), default=0)
        if found == max(allowed) or (found and time.monotonic() - began > patience_s):
            return found
        if time.monotonic() - spoke > TELL_S:
            spoke = time.monotonic()
            text = f"nodes for {max(allowed)} ranks of {command.told(each)}; the Ray cluster has room for {room}"
            print(f"waiting for {text}", flush=True)
            with suppress(StoreError):  # the next word may get through
                run.beat({"waiting": text}, attempt)
        time.sleep(POLL_S)


def _leave(signum: int, frame: object) -> None:
    """While there is no rank that would have to save."""
    sys.stdout.flush()
    os._exit(PREEMPTED)


def nodes() -> list[dict[str, float]]:
    """What each living node has, whoever uses it now."""
    import ray

    return [each["Resources"] for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]


def fit(about: dict[str, Any], ranks: int, each: dict[str, float]) -> tuple[Exit | None, str]:
    """Run the ranks to their end; returns what `train` does.  Raises NotStarted, RayError."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks are told through the run's record, and end this
    never = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
    with tempfile.TemporaryDirectory() as folder:  # checkpoints and metrics go to our store; this stays empty
        # Not a TorchTrainer: its processes would import torch and make a group that the ranks, which are further
        # processes, have no use for.
        trainer = DataParallelTrainer(
            node.work, train_loop_config=about,
            scaling_config=ScalingConfig(num_workers=ranks, use_gpu="GPU" in each, resources_per_worker=each),
            run_config=RunConfig(name=f"{about['run']}-{about['start']}", storage_path=folder, failure_config=never),
        )  # fmt: skip
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return worst(error.worker_failures)
        except ControllerError as error:
            early = WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
            if isinstance(error.controller_failure, early):
                raise NotStarted(said(error.controller_failure)) from None
            return Exit(-1, NOT_READY), redact(f"Ray Train: {error.controller_failure}")
    return None, ""


def worst(failures: dict[int, Exception]) -> tuple[Exit, str]:
    """The failure that explains the others: that of a rank, or of the Ray worker that kept it."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    found = []
    for rank, error in failures.items():
        chain = causes(error)
        if own := next((e for e in chain if isinstance(e, node.RankFailed)), None):
            found.append((Exit(rank, own.code), own.why))
        elif any(isinstance(e, RayActorError | WorkerHealthCheckFailedError) for e in chain):
            why = f"rank {rank}: its Ray worker or node was lost: {said(error)}"
            found.append((Exit(rank, -signal.SIGKILL), why))
        else:  # of the node, as its disk that is full
            found.append((Exit(rank, NOT_READY), f"rank {rank} could not be started: {said(error)}"))
    return min(found, key=lambda each: order(each[0]))


def said(error: BaseException) -> str:
    """What Ray has to say of a worker that died, without the description of all its parts."""
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("The actor is dead")), lines[-1])[:LONGEST]


def causes(error: BaseException | None) -> list[BaseException]:
    """The error and what Ray has wrapped in it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
    return found


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of Ray's may hold up a normal exit
