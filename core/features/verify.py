"""Whether stored features are what they were when they were written, and still what the teachers give."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from core.features.codec import FeatureError, decode, encode
from core.features.rows import VIEW_BOX, Rows
from core.features.sets import INDEX, FeatureSet, file
from core.features.work import Chunk, Work
from core.methods.base import Outputs
from core.storage import MissingObject

SAMPLED = 4  # parts of which the first rows are computed again
LEAST_COSINE = 0.999  # of a token with the same one of another device or version, both as they are stored


def verify(work: Work, teachers: dict[str, Outputs], device: torch.device, say: Callable[[str], None]) -> list[str]:
    """Reads every byte of what is stored, drops damaged parts, and computes some rows again.

    Returns what was wrong, a line each.  Raises FeatureError when rows of sound parts are not what the teacher gives.
    """
    wrong = []
    for name, found in work.sets.items():
        for view in range(work.views):
            for number in sorted(found.done(view)):
                if problem := _damage(found, view, number):
                    found.drop(view, number)
                    wrong.append(f"teacher {name}, view {view}, part {number}: {problem}; dropped")
            if found.drop_wrong_index(view):
                wrong.append(f"teacher {name}, view {view}: {INDEX} is damaged or not of these parts; dropped")
            found.seal(view)
    say(f"{work.split}: {len(work.done()):,} of {len(work.items()):,} parts are whole")
    _recompute(work, teachers, device, say)
    return wrong


def _damage(found: FeatureSet, view: int, number: int) -> str:
    """What is wrong with a part's file; nothing if nothing is."""
    try:
        part = found.part(view, number)
        with tempfile.TemporaryFile(prefix="retort-verify-") as local:
            size, crc = found.store.load(file(view, number, part), local)
    except (FeatureError, MissingObject) as error:
        return str(error)
    sound = (size, crc) == (part.bytes, part.crc32c)
    return "" if sound else f"{size} bytes of CRC32C {crc:08x}, not {part.bytes} of {part.crc32c:08x}"


def _recompute(work: Work, teachers: dict[str, Outputs], device: torch.device, say: Callable[[str], None]) -> None:
    done = sorted(work.done())
    sampled = done[:: max(1, len(done) // SAMPLED)][:SAMPLED]
    stored = {name: Rows(found, work.views, None) for name, found in work.sets.items()}
    worst = dict.fromkeys(work.sets, 1.0)
    for chunk in _first_chunks(work, sampled, device):
        for name, teacher in teachers.items():
            worst[name] = min(worst[name], _cosine(chunk, stored[name], teacher, work.sets[name].about["codec"]))
    for name, cosine in worst.items():
        say(f"{work.split}: teacher {name}: rows computed again agree with a cosine of {cosine:.6f} at least")
        if cosine < LEAST_COSINE:
            raise FeatureError(
                f"teacher {name}: stored features of {work.sets[name]} have a cosine of {cosine:.4f} with what the "
                "teacher gives now: images or library have changed; remove that folder and make them again"
            )


def _first_chunks(work: Work, items: list[str], device: torch.device) -> Iterator[Chunk]:
    for item in items:
        chunks = work.chunks([item], device)
        yield next(chunks)


@torch.no_grad()
def _cosine(chunk: Chunk, rows: Rows, teacher: Outputs, codec: str) -> float:
    """The least over the tokens of readable rows."""
    keep = [i for i, row in enumerate(chunk.rows) if row not in chunk.bad]
    kept, _ = rows.read(chunk.view, np.array([chunk.rows[i] for i in keep]))
    now = teacher(chunk.batch)
    least = 1.0
    for kind in ("cls", "patch"):
        if kind in kept and keep:
            live = decode(kind, encode(codec, kind, getattr(now, kind)[keep].cpu()))
            least = min(least, float(F.cosine_similarity(decode(kind, kept), live, dim=-1).min()))
    if VIEW_BOX in kept and chunk.boxes is not None and not torch.equal(kept[VIEW_BOX], chunk.boxes[keep]):
        raise FeatureError(f"{chunk.rows}: crops are not those of the stored features; images have changed since")
    return least
