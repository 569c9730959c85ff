"""What is to happen to a run of the simulator: drawn from a seed, so that it can be had again."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from enum import Enum

HOME = (2, 1)  # ranks and ZeRO stage of the uninterrupted run
WORLDS, ZEROS, NODES = (1, 1, 2, 2, 2, 4), (0, 1, 2, 3), 2
STEPS = (12, 16)


class Kind(Enum):
    """Values are what the summary says."""

    KILL_AT_STEP = "a rank killed at a step"
    KILL = "a rank killed at a moment"
    STOP = "a rank asked to stop"
    STOP_TWICE = "a rank asked to stop twice"
    SLEEP = "rank 0 asleep while another attempt starts"
    BUSY = "503s"
    TOO_MANY = "429s"
    NO_REQUEST = "requests lost"
    NO_ANSWER = "answers lost"
    CUT_BODY = "bodies cut"
    SILENCE = "store silent for a moment"
    FLIP = "a byte of the newest checkpoint flipped"
    NODE = "another node"
    WORLD = "another number of ranks"
    ZERO = "another ZeRO stage"


INTERRUPTIONS = {Kind.KILL_AT_STEP: 3, Kind.KILL: 4, Kind.STOP: 3, Kind.STOP_TWICE: 2, Kind.SLEEP: 3}  # and weights
FAULTS = (Kind.BUSY, Kind.TOO_MANY, Kind.NO_REQUEST, Kind.NO_ANSWER, Kind.CUT_BODY, Kind.SILENCE)
CHANGES = (Kind.FLIP, Kind.NODE, Kind.WORLD, Kind.ZERO)


@dataclass(frozen=True)
class Event:
    kind: Kind
    rank: int
    step: int  # it comes when this rank has taken so many steps of the attempt,
    delay_s: float  # and so long after that
    signals: tuple[str, ...] = ()
    requests: int = 0  # that a fault hits
    lasts_s: float = 0.0


@dataclass(frozen=True)
class Try:
    """One attempt: where it runs, and what happens to it."""

    world: int
    zero: int
    node: int  # whose spool it finds
    end: Event | None = None
    faults: tuple[Event, ...] = ()
    flip: float | None = None  # before it: which byte of the newest checkpoint, as a share
    linger_s: float = 0.0  # that ranks have left when one of them has died


@dataclass(frozen=True)
class Plan:
    seed: int
    steps: int
    keep: int
    flush_s: float
    s3: bool  # else a folder
    tries: tuple[Try, ...]

    @property
    def moves(self) -> bool:
        """Whether any attempt computes elsewhere than the uninterrupted run."""
        return any((t.world, t.zero) != HOME for t in self.tries)

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.steps} steps, keep {self.keep}, flush {self.flush_s} s, "
        lines = [head + ("s3" if self.s3 else "folder")]
        for number, each in enumerate(self.tries, 1):
            lines.append(f"  attempt {number}: {each.world} ranks, ZeRO {each.zero}, node {each.node}"
                         + (f", byte flipped at {each.flip}" if each.flip is not None else ""))  # fmt: skip
            lines += [f"    {told(event)}" for event in (*each.faults, each.end) if event is not None]
        return "\n".join(lines)


def told(event: Event) -> str:
    given = {f.name: getattr(event, f.name) for f in fields(event) if getattr(event, f.name) != f.default}
    return f"{given.pop('kind').value}: " + ", ".join(f"{name} {value}" for name, value in given.items())


def draw(seed: int, steps: int = 0, most: int = 6) -> Plan:
    """steps: instead of drawn ones.  most: attempts to which something happens."""
    dice = random.Random(seed)
    drawn, s3, moves = dice.choice(STEPS), dice.random() < 0.5, dice.random() < 0.5
    keep, flush_s, tries = dice.choice((2, 3)), dice.choice((0.1, 30.0)), list[Try]()
    for number in range(dice.randint(4, 6)):
        tries.append(_try(dice, tries[-1].node if tries else 0, number > 0, s3, moves))
    return Plan(seed, steps or drawn, keep, flush_s, s3, tuple(tries[:most]))


def calm(after: Try) -> Try:
    """An attempt in the same place that nothing happens to."""
    return Try(after.world, after.zero, after.node)


def _try(dice: random.Random, node: int, later: bool, s3: bool, moves: bool) -> Try:
    world, zero = (dice.choice(WORLDS), dice.choice(ZEROS)) if moves else HOME
    if later and dice.random() < 0.4:
        node = dice.randrange(NODES)
    faults = [_fault(dice) for _ in range(dice.choice((0, 1, 2, 3)))] if s3 else []
    flip = round(dice.random(), 4) if later and dice.random() < 0.2 else None
    return Try(world, zero, node, _end(dice, world), tuple(faults), flip, dice.choice((0.0, 0.3, 1.0)))


def _end(dice: random.Random, world: int) -> Event:
    kind = dice.choices(list(INTERRUPTIONS), list(INTERRUPTIONS.values()))[0]
    signals = dice.choices(("SIGTERM", "SIGUSR1", "SIGUSR2"), k=2 if kind is Kind.STOP_TWICE else 1)
    if kind not in (Kind.STOP, Kind.STOP_TWICE):
        signals = []
    rank = 0 if kind is Kind.SLEEP else dice.randrange(world)
    lasts_s = {Kind.SLEEP: dice.uniform(2.0, 8.0), Kind.STOP_TWICE: dice.uniform(0.0, 0.2)}.get(kind, 0.0)
    first = 1 if kind is Kind.KILL_AT_STEP else 0
    return Event(kind, rank, dice.randint(first, 4), round(dice.uniform(0.0, 0.3), 3), tuple(signals), 0,
                 round(lasts_s, 2))  # fmt: skip


def _fault(dice: random.Random) -> Event:
    kind = dice.choice(FAULTS)
    requests = 0 if kind is Kind.SILENCE else dice.choice((1, 3, 8, 40))
    lasts_s = round(dice.uniform(0.5, 3.0), 2) if kind is Kind.SILENCE else 0.0
    return Event(kind, 0, dice.randint(0, 3), round(dice.uniform(0.0, 0.3), 3), (), requests, lasts_s)
