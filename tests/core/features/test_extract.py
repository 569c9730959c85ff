"""Teachers run over a data set once, by workers that come, die and come again."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from core.data.shards import write_shards
from core.features import extract as extracting
from core.features.codec import FeatureError
from core.features.extract import extract
from core.features.rows import Rows
from core.features.sets import FeatureSet
from core.features.work import Work
from core.methods.base import Batch, Features
from core.storage import open_store
from tests import toy
from tests.core.features.toy_features import CPU, SHORT, Pixels, commits, fill, planned, values, work_off
from tests.ranks import Ranks

PARTS = 6


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts as they are committed in this process, by place."""
    seen, commit = list[str](), FeatureSet.commit

    def counting(self: FeatureSet, view: int, number: int, path: Path, bad: list[int]) -> bool:
        seen.append(f"{self}/{view}/{number}")
        return commit(self, view, number, path, bad)

    monkeypatch.setattr(FeatureSet, "commit", counting)
    return seen


def test_everything_is_stored_once_and_is_what_the_teacher_gave(root: str, counted: list[str]) -> None:
    work = planned(root, views=2)
    teacher = work_off(work, root)
    assert len(work.done()) == len(work.items()) == 2 * PARTS
    assert Counter(counted) == {f"{found}/{view}/{part}": 1 for found in work.sets.values() for view in range(2)
                                for part in range(PARTS)}  # fmt: skip
    assert Counter(teacher.seen) == dict.fromkeys(range(48), 2 * len(work.sets))
    again = Pixels()
    for chunk in work.chunks(["1-2"], CPU):
        expected = again(chunk.batch).patch[: len(chunk.rows)]
        rows = list(chunk.rows)
        assert torch.equal(values(work, "one", 1)["patch"][rows], expected)
    assert not torch.equal(values(work, "one", 0)["patch"], values(work, "one", 1)["patch"]), "views differ"
    assert not list(open_store(root).list("features/work/")), "claims are removed"


def test_nothing_is_done_when_everything_is_there(root: str, counted: list[str]) -> None:
    work_off(planned(root), root)
    counted.clear()
    assert not work_off(planned(root), root).seen
    assert not counted


def test_two_workers_store_every_part_once(root: str, counted: list[str]) -> None:
    works = [planned(root), planned(root)]
    teachers = [Slow(), Slow()]
    threads = [threading.Thread(target=work_off, args=(w, root, t)) for w, t in zip(works, teachers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == len(set(counted)) == 2 * PARTS
    assert all(teacher.seen for teacher in teachers)
    assert Counter(teachers[0].seen + teachers[1].seen) == dict.fromkeys(range(48), 2)


class Slow(Pixels):
    def __call__(self, batch: Batch) -> Features:
        time.sleep(0.02)
        return super().__call__(batch)


class Stuck(Pixels):
    """Gets through a part and a bit."""

    def __call__(self, batch: Batch) -> Features:
        if len(self.seen) >= 2 * 10:  # of two teachers
            time.sleep(600)
        return super().__call__(batch)


def test_a_worker_that_is_killed_in_the_middle_leaves_its_part_to_the_next(root: str, counted: list[str]) -> None:
    work = planned(root)
    before = _killed(work, root)
    teacher = work_off(work, root)
    made = PARTS - len(before)
    assert len(counted) == len(set(counted)) == 2 * made, "what was there is not made again"
    assert len(set(teacher.seen)) == 8 * made
    whole = planned(f"{root}/other", source=f"{root}/data")
    work_off(whole, f"{root}/other")
    assert torch.equal(values(work, "one")["patch"], values(whole, "one")["patch"])


def _killed(work: Work, root: str) -> set[str]:
    """Items that a worker had finished when it got SIGKILL in the middle of the next."""
    ranks = Ranks(work_off, 1, work, root, Stuck())
    try:
        limit = time.monotonic() + 120
        while len(list(open_store(root).list("features/work/"))) < 3 or not work.done():  # a beat, two claims
            assert time.monotonic() < limit
            time.sleep(0.1)
        ranks.signal(0, signal.SIGKILL)
        ranks.processes[0].join(30)
    finally:
        ranks.end()
    assert 0 < len(work.done()) < PARTS
    return work.done()


def test_an_unreadable_image_is_a_bad_row_and_no_other(tmp_path: Path) -> None:
    root = toy.store(tmp_path, images=20)
    source = planned(root).inputs.source
    samples = [source.read(i) for i in range(20)]
    data = [b"no image" if i in (3, 17) else raw.data for i, raw in enumerate(samples)]
    write_shards(
        ((r.key, d, "png", 0) for r, d in zip(samples, data, strict=True)), open_store(root), "broken", 10**6, ["a"]
    )
    work = planned(root, source="store:broken")
    work_off(work, root)
    rows = Rows(work.sets["one"], 1, None)
    assert rows.lacking() == 0
    assert rows.read(0, torch.arange(20).numpy())[1].tolist() == [3, 17]


def test_numbers_that_a_codec_cannot_hold_stop_the_worker_and_nothing_of_them_is_stored(root: str) -> None:
    class Huge(Pixels):
        def __call__(self, batch: Batch) -> Features:
            found = super().__call__(batch)
            return Features(found.cls * 1e6, found.patch)

    work = planned(root, codec="fp16")
    with pytest.raises(FeatureError, match=r"teacher (one|two): cls holds infinities or NaN as fp16; use data.codec"):
        work_off(work, root, Huge())
    assert not list(commits(work))


def test_progress_is_told_with_rate_and_what_is_left(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extracting, "SAY_EVERY_S", 0.0)
    work, said = planned(root), list[str]()
    extract(work, dict.fromkeys(work.sets, Pixels()), root, CPU, said.append, **SHORT)
    assert len(said) >= 24
    assert all(line.startswith("train: ") and " of 48 rows are stored; " in line for line in said)
    assert "rows/s here, at most" in said[-1]
    progress = extracting.Progress(work, said.append)
    progress.add(0)
    assert said[-1] == "train: 48 of 48 rows are stored; other workers have the rest"


def test_a_view_whose_last_worker_died_before_sealing_it_is_sealed(root: str) -> None:
    work = planned(root)
    work_off(work, root)
    found = work.sets["one"]
    assert found.store.size("view-0/index.json") is None
    fill(work, root)
    assert found.store.size("view-0/index.json")
