"""A simulator of bad luck: `python -m tests.system.soak --runs N --seed S [--interruptions K]`.

Each run is a small real one on real ranks; its seed decides how it is killed, signalled, put to sleep and moved, and
what its store does. In the end it must be the run that nothing happened to. One run again: `--runs 1 --seed ITS_SEED`.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from unittest.mock import patch

from core import commits
from core.storage import Store, open_store
from tests.conftest import make_bucket
from tests.faults import FaultyProxy
from tests.system import soak_check as check
from tests.system.attempts import prepared, recipe_of
from tests.system.soak_crew import ASLEEP, KILLED, STORE, Crew, Orders
from tests.system.soak_plan import CHANGES, FAULTS, HOME, INTERRUPTIONS, Kind, Plan, Try, calm, draw

CALM_TRIES = 3  # in which a run must finish when nothing happens any more


@dataclass
class Place:
    """Where runs are held: stores in a folder and, behind a proxy, in a bucket."""

    folder: Path
    bucket: str
    proxy: FaultyProxy
    _wholes: dict[int, check.Whole] = field(default_factory=dict)

    def whole(self, steps: int) -> check.Whole:
        """The uninterrupted run of so many steps."""
        if steps not in self._wholes:
            plan = Plan(-steps, steps, 2, 30.0, False, (Try(*HOME, 0),))
            run = Simulation(plan, self)
            assert run.attempt(plan.tries[0]), run.report.ends
            assert not run.report.wrong, run.report.wrong
            self._wholes[steps] = check.whole(run.root, run.name, run.trained())
        return self._wholes[steps]


@dataclass
class Report:
    """What happened to a run, and what is wrong with it."""

    plan: Plan
    ends: list[str] = field(default_factory=list)
    happened: Counter[Kind] = field(default_factory=Counter)
    resumes: int = 0
    lost: int = 0
    superseded: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def interruptions(self) -> int:
        return sum(self.happened[kind] for kind in INTERRUPTIONS)

    def __str__(self) -> str:
        verdict = "MISMATCH" if self.wrong else "ok"
        where = "s3" if self.plan.s3 else "folder"
        return (f"seed {self.plan.seed}: {verdict}, {self.seconds:.0f} s, {where}, {self.plan.steps} steps, "
                f"{self.interruptions} interruptions, {self.resumes} resumes, {self.lost} steps lost: "
                f"{', '.join(self.ends)}")  # fmt: skip


class Simulation:
    """One run, from its first attempt to its end."""

    def __init__(self, plan: Plan, place: Place) -> None:
        self.plan, self.place, self.report = plan, place, Report(plan)
        self.name, self.root = f"soak-{plan.seed}", place.bucket if plan.s3 else f"file://{place.folder}/store"
        self.run: Store = open_store(f"{self.root}/runs/{self.name}")
        self._notes = place.folder / self.name  # what the ranks write down
        self._crews: list[Crew] = []
        self._reached: dict[int, int] = {}  # step of the run, by attempts when they were interrupted
        self._flips: list[check.Flip] = []
        self._sleeper: Crew | None = None

    def play(self) -> Report:
        reference, began = self.place.whole(self.plan.steps), time.monotonic()
        tries = [*self.plan.tries, *[calm(self.plan.tries[-1])] * CALM_TRIES]
        if not any(self.attempt(each) for each in tries):
            self.report.wrong.append("it does not finish")
        for crew in self._crews:
            self.report.happened += crew.happened + Counter(b.event.kind for b in crew.bursts if b.hits)
        if not self.report.wrong:
            claims = commits.claims(self.run)
            self.report.resumes = sum(claim.resumed is not None for claim in claims)
            self.report.lost = check.lost(claims, self._reached)
            self.report.wrong += check.differences(self.plan, self.root, self.name, self.trained(), reference)
            self.report.wrong += check.breaches(self.run, self.plan, self._flips)
        self.report.seconds = time.monotonic() - began
        if self.report.wrong:
            check.keep(self.run, self._notes / "store")
        return self.report

    def attempt(self, attempt: Try) -> bool:
        """Whether the run has ended, well or not."""
        self._change(attempt)
        crew = Crew(self._orders(attempt), attempt, self.place.proxy)
        self._crews.append(crew)
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is None:
            ends = [(crew, crew.attend())]
        else:
            assert sleeper.attempt.end is not None
            due = time.monotonic() + sleeper.attempt.end.lasts_s
            end = crew.attend(beside=lambda: sleeper.wake(due))
            sleeper.wake()
            ends = [(sleeper, sleeper.attend()), (crew, end)]
        self.place.proxy.faults = []
        ended = sum(self._judge(*each) for each in ends) > 0
        if crew.asleep and ended:
            crew.wake()
            end, self.place.proxy.faults = crew.attend(), []
            self._judge(crew, end)
        self._sleeper = crew if crew.asleep else None
        return ended

    def trained(self) -> list[check.Micro]:
        return [each for crew in self._crews for each in crew.trained()]

    def _change(self, attempt: Try) -> None:
        """What is different now, and what has been damaged meanwhile."""
        if self._crews:
            before, found = self._crews[-1].attempt, self.report.happened
            found[Kind.NODE] += attempt.node != before.node
            found[Kind.WORLD] += attempt.world != before.world
            found[Kind.ZERO] += attempt.zero != before.zero
        if attempt.flip is not None and (flipped := check.flip(self.run, attempt.flip)):
            self._flips.append(flipped)
            self.report.happened[Kind.FLIP] += 1

    def _judge(self, crew: Crew, end: str) -> bool:
        """Note how an attempt has ended, or fallen asleep; whether that ends the run."""
        number, wrong = crew.orders.number, self.report.wrong
        self._reached.setdefault(number, max((each[0] for each in crew.trained()), default=0))
        self.report.ends.append(f"{number} {end.partition(' ')[0].lower()}")
        excused = any(burst.hits for each in self._crews[-2:] for burst in each.bursts)
        if end == "PREEMPTED":
            if not crew.happened[Kind.STOP] + crew.happened[Kind.STOP_TWICE]:
                wrong.append(f"attempt {number} stopped and nobody had asked for it")
            if not excused and (there := check.committed(self.run)) < self._reached[number]:
                wrong.append(f"attempt {number} stopped at step {self._reached[number]}, step {there} is committed")
        elif end == "SUPERSEDED":
            self.report.superseded += 1
            if all(claim.attempt <= number for claim in commits.claims(self.run)):
                wrong.append(f"attempt {number} says that another one has started")
        elif end == "FINISHED":
            if (by := check.author(self.run)) > number:
                wrong.append(f"attempt {number} says that it has finished, attempt {by} has")
        elif end not in (KILLED, ASLEEP) and not (excused and (end.startswith(STORE) or end == "OUTAGE")):
            wrong.append(f"attempt {number}: {end}")
        return end == "FINISHED" or bool(wrong)

    def _orders(self, attempt: Try) -> Orders:
        plan, folder, end = self.plan, self.place.folder, attempt.end
        settings = f"""loader.workers=0 loader.cache_dir={folder}/cache train.precision=fp32 launch.hang_s=0
            launch.grace_s=20 checkpoint.patience_s=30 checkpoint.keep={plan.keep} log.flush_s={plan.flush_s}
            checkpoint.spool={folder}/node-{attempt.node}"""
        recipe = recipe_of("toy", attempt.zero, plan.steps, *settings.split())
        self._notes.mkdir(exist_ok=True)
        kill = (end.rank, end.step) if end is not None and end.kind is Kind.KILL_AT_STEP else None
        return Orders(recipe, self.root, self.name, len(self._crews) + 1, self._notes, kill)


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Both stores with the toy's data; nothing of the caller's own AWS settings is seen."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"http://{host}:{port}")
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    own = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
           "AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
           "AWS_CONFIG_FILE": f"{folder}/none", "AWS_SHARED_CREDENTIALS_FILE": f"{folder}/none",
           "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with patch.dict(os.environ, {**kept, **own}, clear=True):
        bucket = f"s3://{make_bucket(own, 'soak')}/{secrets.token_hex(8)}"
        data = open_store(prepared(f"file://{folder}/store", "toy"))
        for entry in data.list("data/"):
            open_store(bucket).put(entry.key, data.get(entry.key))
        yield Place(folder, bucket, proxy)
    proxy.shutdown()
    proxy.server_close()
    server.stop()


def table(reports: list[Report]) -> str:
    happened = sum((r.happened for r in reports), Counter[Kind]())
    interruptions, seconds = sum(r.interruptions for r in reports), sum(r.seconds for r in reports)
    rows: list[tuple[str, object]] = [("runs", len(reports)), ("interruptions", interruptions)]
    rows += [(f"  {kind.value}", happened[kind]) for kind in INTERRUPTIONS]
    rows += [("faults and changes beside", sum(happened[kind] for kind in (*FAULTS, *CHANGES)))]
    rows += [(f"  {kind.value}", happened[kind]) for kind in (*FAULTS, *CHANGES)]
    rows += [("resumes", sum(r.resumes for r in reports)), ("lost steps", sum(r.lost for r in reports)),
             ("attempts superseded", sum(r.superseded for r in reports)),
             ("mismatches", sum(bool(r.wrong) for r in reports)),
             ("seconds", f"{seconds:.0f} ({seconds / max(interruptions, 1):.1f} an interruption)")]  # fmt: skip
    return "\n".join(f"{name:45} {value}" for name, value in rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.system.soak")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--interruptions", type=int, default=0, help="go on with more runs until so many have happened")
    options = parser.parse_args(arguments)
    folder, reports = Path(tempfile.mkdtemp(prefix="retort-soak-")), list[Report]()
    with place(folder) as there:
        for seed in count(options.seed):
            if len(reports) >= options.runs and sum(r.interruptions for r in reports) >= options.interruptions:
                break
            reports.append(Simulation(draw(seed), there).play())
            print("\n  ".join([str(reports[-1]), *reports[-1].wrong]), flush=True)
            if reports[-1].wrong:
                print(f"{reports[-1].plan}\nagain: python -m tests.system.soak --runs 1 --seed {seed}", flush=True)
    print(f"\n{table(reports)}")
    if any(report.wrong for report in reports):
        print(f"what the ranks and stores hold: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
