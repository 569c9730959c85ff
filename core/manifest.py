"""What a checkpoint consists of: its slices, files, sums, and where training goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FOLDER = "checkpoints"
MOST_RANKS = 1 << 20  # that a checkpoint can be of
Window = tuple[int, int]  # first and last step, of the run, whose samples are left out


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to something else."""


@dataclass(frozen=True)
class Slice:
    """A run of one tensor's flattened elements in one file."""

    name: str
    kind: str  # weight | exp_avg | exp_avg_sq | buffer | method
    start: int
    numel: int
    dtype: str
    offset: int  # bytes, in the file
    size: int
    crc32c: int
    file: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Position:
    """Where training goes on."""

    stage: str
    stage_step: int  # steps of this stage taken
    step: int  # steps taken over all stages
    finished: bool  # the stage is complete
    samples: int = 0  # of this stage drawn so far: the position in the sample order


@dataclass
class Manifest:
    """`key` names the folder of the files; the rest is what all ranks agree on, and what each rank wrote."""

    position: Position
    fingerprint: str
    claim: int  # entry of the run's log with which the attempt that made it started
    attempt: int
    world: int
    zero_stage: int
    adam_step: int
    created: float
    shapes: dict[str, list[int]]  # of every tensor, by "kind/name" for buffers and method state, else by name
    score: float | None = None  # loss on held-out images, where there are some
    metrics: list[str] = field(default_factory=list)  # keys of the segments that hold all rows up to here
    skipped: list[Window] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> size, crc32c
    slices: list[Slice] = field(default_factory=list)
    number: int = 0  # of its entry in the run's log; 0 = not committed

    @property
    def key(self) -> str:
        """Folder of its files in the run."""
        return folder(self.position.step, self.claim)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(about["size"] for about in self.files.values())


def folder(step: int, claim: int) -> str:
    """One attempt saves a step once; after a rewind it claims the run anew."""
    return f"{FOLDER}/{step:08d}-{claim:06d}"


def part(rank: int) -> str:
    return f"rank-{rank:04d}"


def to_json(manifest: Manifest) -> dict[str, Any]:
    content = asdict(manifest)
    del content["number"]
    return content


def from_json(content: dict[str, Any]) -> Manifest:
    """Raises TypeError, KeyError, ValueError, AttributeError when it is something else."""
    content = {**content, "position": Position(**content["position"])}
    content["skipped"] = [(int(first), int(last)) for first, last in content["skipped"]]
    content["slices"] = [Slice(**s) for s in content["slices"]]
    found = Manifest(**content)
    if not _is_sound(found):
        raise ValueError("it is no manifest of a checkpoint")
    return found


def _is_sound(m: Manifest) -> bool:
    """Whether its fields are of their kinds."""
    place = m.position
    numbers = [m.claim, m.attempt, m.world, place.step, place.stage_step, place.samples, *(s.size for s in m.slices)]
    numbers += [number for about in m.files.values() for number in (about["size"], about["crc32c"])]
    whole = all(type(number) is int and number >= 0 for number in numbers) and m.world <= MOST_RANKS
    names = all(isinstance(name, str) for name in (place.stage, m.fingerprint, *m.files, *m.shapes, *m.metrics))
    return whole and names and type(m.created) in (int, float) and type(m.score) in (int, float, type(None))
