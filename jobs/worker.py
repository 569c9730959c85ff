"""One rank of one attempt: `python -m jobs.worker --run ID --store URI --attempt N`, whoever starts it.

Reads the recipe from the run's record, joins the other ranks and trains. Rank 0 writes `running`, heartbeats, and
`succeeded` or `preempted`. Exit codes: 0 finished, 75 preempted, 70 hung; else failed, with the reason on standard
error: 3 store or hardware, which another attempt may find in better health, 2 recipe or data, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import process, ranks_env
from jobs.errors import OK, PREEMPTED, code_of, describe

if TYPE_CHECKING:
    from jobs.logkeeper import LogKeeper


class Stop:
    """This rank's wish to stop at the next step boundary, set by a signal or by what the run's record says.

    A second signal changes nothing: the save that the first one asked for is completed.
    """

    def __init__(self) -> None:
        self.reason, self._told = "", False

    def __call__(self) -> bool:
        if self.reason and not self._told:
            self._told = True
            print(f"{self.reason}: saving and leaving", flush=True)
        return bool(self.reason)

    def on_signal(self, signum: int, frame: object) -> None:
        self.because(f"{signal.Signals(signum).name} received")  # told by the loop: handlers had better not print

    def because(self, reason: str) -> None:
        self.reason = self.reason or reason


def main(arguments: list[str]) -> int:
    stop = Stop()
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, stop.on_signal)
    process.die_with_parent()
    parser = argparse.ArgumentParser(prog="jobs.worker")
    parser.add_argument("--run", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--logs", default="", help="folder with this rank's log, where nobody else keeps it")
    options = parser.parse_args(arguments)
    os.environ |= ranks_env.from_scheduler(os.environ)
    keeper = _keeper(options) if options.logs else None
    try:
        return work(options.run, options.store, options.attempt, stop)
    except Exception as error:
        sys.stdout.flush()
        print(describe(error), file=sys.stderr, flush=True)
        return code_of(error)
    finally:
        sys.stdout.flush()
        if keeper:
            keeper.close()


def work(run_id: str, root: str, attempt: int, stop: Stop) -> int:
    """Train this rank's share; returns 0 or 75."""
    from jobs.heartbeat import Heartbeat
    from jobs.record import IllegalMove, Run, State

    run = Run.find(root, run_id)
    recipe = run.recipe()
    import torch

    from core.engine import init_distributed, pick_device, shutdown
    from core.storage import StoreError
    from core.train import Outcome, train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = pick_device(recipe.launch.device)
    init_distributed(device, ranks_env.meet(run.store, attempt))
    print(ranks_env.describe(), flush=True)
    leader = int(os.environ["RANK"]) == 0
    if leader:
        ranks = int(os.environ["WORLD_SIZE"])
        nodes = os.environ.get(ranks_env.NODELIST, "") or socket.gethostname()
        run.move(State.RUNNING, attempt, host=socket.gethostname(), nodes=nodes, ranks=ranks, device=device.type)
    pulse = Heartbeat(run, attempt, stop.because) if leader else None
    with pulse or nullcontext():
        outcome = train(recipe, run.store, root, attempt, pulse.progress if pulse else _ignore, stop)
    print(f"{outcome.name.lower()}: {outcome.value}", flush=True)
    if outcome is Outcome.FINISHED:
        if leader:
            with suppress(IllegalMove):  # cancelled meanwhile
                run.move(State.SUCCEEDED, attempt)
        shutdown()
        return OK
    if leader and outcome is not Outcome.SUPERSEDED:
        with suppress(IllegalMove, StoreError):  # whoever watches the ranks says it otherwise
            by = f" ({stop.reason or 'by another rank: its log says why'})" if outcome is Outcome.PREEMPTED else ""
            run.move(State.PREEMPTED, attempt, reason=f"{outcome.value}{by}")
    return PREEMPTED


def _keeper(options: argparse.Namespace) -> LogKeeper:
    from jobs.logkeeper import LogKeeper
    from jobs.record import Run

    name = f"rank-{int(os.environ['RANK']):04d}.log"
    return LogKeeper(Run(options.store, options.run), Path(options.logs), names=name)


def _ignore(row: dict[str, Any]) -> None:
    pass


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a broken process group or of an upload that goes nowhere could hold up a normal exit or hide the code.
    sys.exit(OK) if code == OK else os._exit(code)
