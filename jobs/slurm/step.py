"""What a batch script does around the ranks: `python -m jobs.slurm.step begin|end --run ID --store URI --logs DIR`.

begin: every node checks what it sees, and the first one takes the run for this job. end: what became of the attempt is
written down, and the script learns from the exit code whether SLURM is to start the job again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from core.storage import MissingObject, StoreError
from jobs import inputs
from jobs.errors import NOT_READY, OK, PREEMPTED, code_of, describe, redact
from jobs.launchers import tries
from jobs.launchers.ending import STOP_SIGNALS, Exit, is_failure, order, reason
from jobs.logkeeper import LogKeeper
from jobs.record import Run, State, Transition
from jobs.slurm import queue
from jobs.slurm.script import CANCELLED, NOTHING

SRUN_SAYS = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
SRUN_ENDS = re.compile(r"Terminating StepId|Job step aborted|forcing job termination")
SIGNALLED = {signal.strsignal(number) or "": int(number) for number in signal.valid_signals()}
SIGNALLED["Out Of Memory"] = signal.SIGKILL
REASON_LINES = 12
MOST_BLIND = 10  # starts of a job that cannot write down how it ended, because the store is away


def main(arguments: list[str]) -> int:
    for signum in STOP_SIGNALS:  # are for the ranks
        signal.signal(signum, signal.SIG_IGN)
    options = _options(arguments)
    try:
        run, job = Run(options.store, options.run), job_id(os.environ)
        if options.what == "begin":
            return begin(run, job, Path(options.logs))
        return end(run, job, Path(options.logs), Path(options.said), options.code, options.begun)
    except Exception as error:
        print(describe(error), file=sys.stderr, flush=True)
        return code_of(error)


def begin(run: Run, job: str, logs: Path) -> int:
    """0: go on, with the attempt's number on standard output."""
    tries.check(run, f"node {socket.gethostname()}")
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return OK
    own = {"launcher": "slurm", "job": job, "slurm": os.environ.get("SLURM_CLUSTER_NAME", ""), "logs": str(logs),
           "ranks": int(os.environ.get("SLURM_NTASKS", "1")), "nodes": int(os.environ["SLURM_NNODES"])}  # fmt: skip
    attempt = take(run, job, own)
    if attempt is None:
        return NOTHING if run.last().state == State.SUCCEEDED else CANCELLED
    (logs / f"attempt-{attempt:04d}").mkdir(parents=True, exist_ok=True)
    print(f"{attempt:04d}", flush=True)
    return OK


def take(run: Run, job: str, own: dict[str, Any]) -> int | None:
    """Make the run this job's: see `tries.take`."""
    return tries.take(run, job, own, lambda last, mine: _why_cut(job, mine, run, last))


def end(run: Run, job: str, logs: Path, said: Path, code: int, begun: bool) -> int:
    """0: done; 75: start the job again; CANCELLED; else failed.  code, said: of srun.  begun: ranks were started."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if not begun and not restarts and inputs.check_store(run.root):
        return NOT_READY  # which `said` says already, and nothing can be written down
    try:
        return _conclude(run, job, logs, said, code, begun)
    except MissingObject as error:
        print(describe(error), file=sys.stderr, flush=True)
        return NOT_READY
    except StoreError as error:  # away since the attempt began: another start may find it again
        print(describe(error), file=sys.stderr, flush=True)
        return PREEMPTED if restarts < MOST_BLIND else NOT_READY


def _conclude(run: Run, job: str, logs: Path, said: Path, code: int, begun: bool) -> int:
    last = run.last()
    folder = logs / f"attempt-{last.attempt:04d}"
    if run.handle(last).get("job") != job:
        return OK if last.state == State.SUCCEEDED else CANCELLED  # another job's: what waits for this one goes too
    LogKeeper(run, folder).close()
    failure = _failure(said.read_text(errors="replace") if said.is_file() else "", code, begun)
    found = tries.conclude(run, job, failure, lambda failed: _reason(failed, folder, said), quiet=code == 0)
    if found.state == State.CANCELLED:
        return CANCELLED
    return PREEMPTED if found.again else OK if found.code == OK else 1


def job_id(environment: Any) -> str:
    """As squeue names it: 12, or 12_3 for a task of an array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return str(environment["SLURM_JOB_ID"])


def _why_cut(job: str, mine: bool, run: Run, last: Transition) -> str:
    """Why an attempt ended without a word."""
    if not mine:
        return f"lost: {run.look(last).text}"
    states = [state for state in queue.tries(job)[:-1] if state]
    how = f" ({states[-1]})" if states else ""
    return f"SLURM ended the job{how} before the attempt could say so, and started it again"


def _failure(said: str, code: int, begun: bool) -> Exit | None:
    """The rank that ended the attempt before its time, by what srun said; rank -1 when none was started."""
    signalled = code - 128 in map(int, STOP_SIGNALS)
    if not begun:
        return None if signalled else Exit(-1, NOT_READY)
    ends = exits(said)
    bad = [each for each in ends if is_failure(each, stopped=True)]
    if bad:
        return min(bad, key=order)
    return None if ends or signalled or code in (OK, PREEMPTED) else Exit(-1, NOT_READY)


def exits(said: str) -> list[Exit]:
    """How tasks ended, from srun's messages, in the order in which it saw them.

    What srun ends itself, because one has failed and the others have not followed, is left out.
    """
    found: list[Exit] = []
    for line in said.splitlines():
        if SRUN_ENDS.search(line) and any(is_failure(each, stopped=True) for each in found):
            break
        if match := SRUN_SAYS.search(line):
            code = re.match(r"Exited with exit code (\d+)", match[3])
            number = SIGNALLED.get(match[3].partition(" (core dumped)")[0].strip())
            if code or number:
                found += [Exit(rank, int(code[1]) if code else -int(number or 0)) for rank in _numbers(match[2])]
    return found


def _numbers(text: str) -> list[int]:
    """`0,2-3` -> [0, 2, 3]"""
    spans = [part.partition("-") for part in text.split(",")]
    return [n for first, _, last in spans for n in range(int(first), int(last or first) + 1)]


def _reason(failure: Exit, folder: Path, said: Path) -> str:
    if failure.rank >= 0:
        return reason(failure, folder / f"rank-{failure.rank:04d}.log")
    lines = said.read_text(errors="replace").strip().splitlines() if said.is_file() else []
    return redact("\n".join(["the ranks could not be started:", *lines[-REASON_LINES:]]))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.slurm.step")
    parser.add_argument("what", choices=("begin", "end"))
    for name in ("run", "store", "logs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--said", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--begun", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
