from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from core import commits
from core import manifest as manifests
from core.commits import Claim, SupersededError
from core.manifest import CheckpointError, Manifest, Slice
from core.storage import MissingObject, Store, StoreError, open_store
from tests.core.logs import Troubled, a_run, change, claim, fail, log, manifest, on_course


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return a_run(tmp_path)


# ---- what an entry holds


def test_an_entry_comes_back_as_it_was_appended(store_uri: str) -> None:
    run = open_store(store_uri).sub("runs/r")
    start = claim(3, 7, 20, lost=5, skipped=((4, 6), (9, 9)), rewound=True)
    piece = Slice("w", "weight", 2, 3, "F32", 64, 12, 99, "rank-0000.safetensors")
    saved = manifest(20, claim=1, world=2, score=0.5, metrics=["metrics/a"], skipped=[(4, 6)], slices=[piece],
                     files={"rank-0000.safetensors": {"size": 76, "crc32c": 5}})  # fmt: skip
    log(run, start, saved)
    assert commits.numbers(run) == [1, 2]
    first, second = commits.read(run, 1), commits.read(run, 2)
    assert isinstance(first, Claim)
    assert isinstance(second, Manifest)
    assert (first.number, second.number) == (1, 2)
    assert commits.replace(first, number=0) == start
    assert commits.replace(second, number=0) == saved


def test_numbers_are_in_order_beyond_nine(run: Store) -> None:
    log(run, *[claim(n) for n in range(1, 13)])
    assert commits.numbers(run) == list(range(1, 13))


def test_two_appenders_at_one_number_have_one_winner(store_uri: str) -> None:
    run, won, gate = open_store(store_uri), {}, threading.Barrier(4)

    def append(attempt: int) -> None:
        gate.wait()
        won[attempt] = commits.append(run, claim(attempt), 1)

    threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [attempt for attempt, first in won.items() if first]
    assert [c.attempt for c in commits.claims(run)] == [winner]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "unreadable"), (b"[]", "unreadable"), (b"{}", "unreadable"),
     (b'{"schema": 99}', "checkpoint schema 99, this Retort reads 2")],
)  # fmt: skip
def test_what_is_no_entry_is_refused_with_its_key(run: Store, content: bytes, said: str) -> None:
    run.put(commits.key(1), content)
    with pytest.raises(CheckpointError, match=f"^commits/000001.json: {said}"):
        commits.read(run, 1)


def test_every_value_of_an_entry_counts(run: Store) -> None:
    log(run, claim(), manifest(4))
    change(run, commits.key(1), attempt=2)
    change(run, commits.key(2), adam_step=5)
    for number in (1, 2):
        with pytest.raises(CheckpointError, match="its checksum is wrong"):
            commits.read(run, number)


def test_an_entry_that_is_damaged_on_its_way_is_asked_for_again(tmp_path: Path) -> None:
    answers = [b"{damaged"]

    class Noisy(Troubled):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            return answers.pop() if answers else super().get_range(key, start, size)

    run = Noisy(tmp_path)
    log(run, claim(5))
    assert commits.read(run, 1) == claim(5, number=1)
    assert answers == []


def test_an_entry_that_is_not_there_is_no_damaged_one(run: Store) -> None:
    with pytest.raises(MissingObject):
        commits.read(run, 1)


# ---- the course of a run


def test_entries_come_newest_first_and_jump_over_what_a_claim_has_passed_over(run: Store) -> None:
    log(run, claim(1), manifest(2), manifest(4), claim(2, resumed=2), manifest(3, claim=4), claim(3, resumed=5))
    assert [e.number for e in commits.entries(run)] == [6, 5, 4, 2, 1]
    assert on_course(run) == [5, 2]
    assert [c.number for c in commits.claims(run)] == [1, 4, 6]


def test_a_claim_that_starts_from_nothing_leaves_nothing_before_it(run: Store) -> None:
    log(run, claim(1), manifest(2), claim(2, resumed=None), manifest(1, claim=3))
    assert on_course(run) == [4]
    log(run, claim(3, resumed=None))
    assert on_course(run) == []


def test_what_a_dead_end_has_passed_over_counts_again_once_it_is_passed_over_itself(run: Store) -> None:
    log(run, claim(1), manifest(2), manifest(4), claim(2, resumed=2), manifest(3, claim=4), claim(3, resumed=3))
    assert on_course(run) == [3, 2]


def test_a_damaged_entry_is_named_and_passed_over(run: Store) -> None:
    log(run, claim(1), manifest(2), manifest(4), manifest(6))
    run.put(commits.key(3), b"damaged")
    said: list[str] = []
    assert [m.position.step for m in commits.checkpoints(run, said.append)] == [6, 2]
    assert len(said) == 1
    assert said[0].startswith("warning: passed over: commits/000003.json: unreadable")


def test_an_entry_that_goes_while_the_log_is_read_is_passed_over(run: Store) -> None:
    log(run, claim(1), manifest(2), manifest(4))
    course = commits.checkpoints(run, warn=[].append)
    assert next(course).number == 3
    run.delete(commits.key(2))
    assert list(course) == []


def test_a_run_without_a_log_has_no_course(run: Store) -> None:
    assert list(commits.entries(run)) == commits.claims(run) == commits.numbers(run) == []


# ---- who may commit


def test_commits_of_one_attempt_follow_each_other(run: Store) -> None:
    log(run, claim(1))
    after = commits.commit(run, manifest(2), 1)
    assert commits.commit(run, manifest(4), after) == 3
    assert on_course(run) == [3, 2]


def test_an_attempt_that_slept_while_another_started_commits_nothing(store_uri: str) -> None:
    run = open_store(store_uri)
    log(run, claim(1), manifest(2), claim(2, resumed=2), manifest(3, claim=3))
    for after in (1, 2):
        with pytest.raises(SupersededError, match="attempt 2 has started on here"):
            commits.commit(run, manifest(4), after)
    assert commits.numbers(run) == [1, 2, 3, 4]


def test_an_attempt_stays_superseded_when_its_own_checkpoints_are_gone(run: Store) -> None:
    log(run, claim(1), manifest(2), claim(2, resumed=2), manifest(3, claim=3), manifest(5, claim=3))
    run.delete(commits.key(2), commits.key(4))
    with pytest.raises(SupersededError):
        commits.commit(run, manifest(4), 2)
    assert on_course(run) == [5]


def test_a_commit_whose_answer_was_lost_is_recognised(tmp_path: Path) -> None:
    run = Troubled(tmp_path, fail(1, "000002", "create", done=True))
    log(run, claim(1))
    with pytest.raises(StoreError):
        commits.commit(run, manifest(2), 1)
    assert commits.commit(run, manifest(2), 1) == 2
    assert commits.numbers(run) == [1, 2]


def test_a_checkpoint_that_somebody_else_has_committed_is_committed(run: Store) -> None:
    log(run, claim(1), manifest(2), manifest(4))
    assert commits.commit(run, manifest(4), 1) == 3, "it lies behind another of the same attempt"
    assert commits.commit(run, manifest(6), 1) == 4
    assert commits.numbers(run) == [1, 2, 3, 4]


def test_entries_are_plain_json(run: Store) -> None:
    log(run, claim(1, skipped=((1, 2),)))
    body = json.loads(run.get("commits/000001.json"))
    assert (body["schema"], body["kind"], body["entry"]["skipped"]) == (2, "claim", [[1, 2]])
    assert "number" not in body["entry"] or body["entry"]["number"] == 0


def test_a_manifest_of_other_kinds_is_damaged_though_its_checksum_is_right(run: Store) -> None:
    sound = manifests.to_json(manifest(4))
    place = sound["position"]
    wrong = [{"world": "1"}, {"world": 1 << 40}, {"created": None}, {"files": []},
             {"files": {"a": {"size": "1", "crc32c": 1}}}, {"position": {**place, "step": "4"}}, {"score": "x"},
             {"position": {**place, "stage": 4}}, {"position": []}, {"slices": [1]}, {"metrics": [1]}]  # fmt: skip
    for number, other in enumerate(wrong, 1):
        body = {"schema": commits.SCHEMA, "kind": "checkpoint", "entry": {**sound, **other}}
        run.put(commits.key(number), json.dumps({**body, "crc32c": commits._sum(body)}).encode())
    for content in (b"[" * 100_000, b'{"schema": 2, "crc32c": 1, "entry": ' + b"[" * 90 + b"]" * 90 + b"}"):
        run.put(commits.key(len(commits.numbers(run)) + 1), content)
    for number in commits.numbers(run):
        with pytest.raises(CheckpointError, match=f"{commits.key(number)}: unreadable: "):
            commits.read(run, number)
    assert list(commits.checkpoints(run, warn=lambda text: None)) == []
