"""features: what is refused, what is stored, what is found damaged, and workers that share it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from core.config import load
from core.small_json import Unreadable
from core.storage import open_store
from jobs import cli, extract, launchers
from jobs.errors import BUG
from jobs.launchers import crew
from jobs.launchers.crew import NoneLeft
from jobs.placement import Placement
from jobs.verbs.features import workers

Command = Callable[..., tuple[int, str, str]]
ONE = Placement(1, "cpu", 1)


@pytest.fixture
def features(capfd: pytest.CaptureFixture[str], root: str, tiny_recipe: Path) -> Command:
    """The verb on the tiny recipe; exit code and what it and its workers said."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["features", str(tiny_recipe), "--store", root, *arguments])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return run


def files(root: str) -> dict[str, int]:
    return {entry.key: entry.size for entry in open_store(root).list("features/")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--split", "train,held"), r"SPLIT: 'held' is not one of train, heldout, texts; did you mean heldout\?"),
        (("--codec", "fp9"), r"data\.codec.*fp9.*fp32, bf16, fp16, fp8, int8"),
        (("--views", "-1"), r"data\.views"),
        (("--launcher", "slurn"), r"LAUNCHER: 'slurn' is unknown; did you mean slurm\?"),
        (("--nproc", "-2"), r"NPROC: -2"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_stored(
    features: Command, root: str, arguments: tuple[str, ...], words: str
) -> None:
    code, _, said = features(*arguments)
    assert code == 2, said
    assert re.search(words, said), said
    assert not files(root)


def test_a_recipe_without_teachers_has_nothing_to_store(features: Command, tiny_recipe: Path, root: str) -> None:
    content = yaml.safe_load(tiny_recipe.read_text())
    content["student"]["args"]["reg_tokens"] = 1
    content |= {"method": {"name": "udi"}, "teachers": {}}
    tiny_recipe.write_text(yaml.safe_dump(content))
    code, _, said = features()
    assert code == 2, said
    assert "no stage of it has teachers whose outputs could be stored" in said
    assert not files(root)


@pytest.mark.parametrize(
    ("wanted", "device", "queues", "count"), [(0, "cuda", False, 8), (3, "cuda", False, 3), (0, "cpu", False, 1),
                                              (0, "cuda", True, 1)]
)  # fmt: skip
def test_without_a_number_every_gpu_of_this_machine_gets_a_worker(
    wanted: int, device: str, queues: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = launchers.find("local")
    monkeypatch.setattr(type(launcher), "gpus", lambda self: 8)
    monkeypatch.setattr(type(launcher), "queues", queues)
    assert workers(wanted, launcher, Placement(1, device, 1)) == count


def test_a_dry_run_says_what_there_would_be_to_do(features: Command, root: str) -> None:
    code, out, _ = features("--dry", "--views", "2", "--codec", "fp8")
    assert code == 0
    assert re.search(r"train at 32 px: 4 rows x 2 views of big: 0\.\d+ GB as fp8; 0 of 2 parts are there", out)
    assert out.endswith("nothing was stored (DRY=1)\n")
    assert not [name for name in files(root) if "features/" in name]


def test_the_next_command_asks_for_what_was_stored_where_it_is(
    features: Command, tiny_recipe: Path, root: str
) -> None:
    _, out, _ = features("--split", "train", "--set", "seed=3")
    wanted = "SET='seed=3 features=auto data.views=1 data.codec=bf16'"
    assert f"next: make submit RECIPE={tiny_recipe} {wanted} STORE={root}\n" in out


def test_everything_is_stored_and_the_next_command_is_named(
    features: Command, tiny_recipe: Path, root: str
) -> None:
    code, out, said = features("--views", "2")
    assert code == 0, said
    assert re.search(rf"train: big: {root}/features/[0-9a-f]{{16}}", out)
    assert f"next: make submit RECIPE={tiny_recipe} SET='features=require data.views=2 data.codec=bf16' " in out
    before = files(root)
    assert len([name for name in before if name.endswith(".safetensors")]) == 2
    _, again, _ = features("--views", "2")
    assert "2 of 2 parts are there" in again
    assert files(root) == before


def test_verify_finds_a_damaged_part_and_the_next_features_mends_it(features: Command, root: str) -> None:
    features()
    before = files(root)
    code, out, _ = features("--verify")
    assert code == 0
    assert "all that is stored is sound" in out
    (name,) = [name for name in before if name.endswith(".safetensors")]
    store = open_store(root)
    store.put(name, store.get(name)[:-3] + b"xyz")
    code, out, _ = features("--verify")
    assert code == BUG
    assert re.search(r"teacher big, view 0, part 0: \d+ bytes of CRC32C \w+, not \d+ of \w+; dropped", out)
    assert "1 damaged parts were dropped; make features RECIPE=... makes them again" in out
    assert features()[0] == 0
    assert files(root) == before


def test_two_workers_of_this_machine_store_everything(features: Command, root: str) -> None:
    code, out, said = features("--nproc", "2", "--launcher", "local")
    assert code == 0, said
    assert "2 of 2 workers ended well" in out
    assert len([name for name in files(root) if name.endswith(".safetensors")]) == 1
    assert not [name for name in files(root) if "/work/" in name]


def test_a_worker_says_what_is_wrong_without_a_traceback(capsys: pytest.CaptureFixture[str], root: str) -> None:
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        assert extract.main(["--store", root, "--order", "0" * 16]) == 3
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    assert re.match(r"error: .*features/orders/0{16}\.json does not exist\n$", capsys.readouterr().err)


@pytest.mark.parametrize("change", [{"recipe": "name: evil\n"}, {"splits": ["heldout"]}, {"recipe": None}])
def test_an_order_that_was_changed_in_the_store_is_not_obeyed(
    root: str, tiny_recipe: Path, change: dict[str, object]
) -> None:
    name, store = extract.order(root, load(str(tiny_recipe)), ["train"]), open_store(root)
    key = f"{extract.ORDERS}/{name}.json"
    assert extract._read(store, name)["splits"] == ["train"]
    store.put(key, json.dumps({**json.loads(store.get(key)), **change}).encode())
    with pytest.raises(Unreadable, match=f"{key}: it has been changed since it was given: make features"):
        extract.work(root, name)


def test_workers_that_are_lost_leave_their_work_to_the_others(tmp_path: Path) -> None:
    script = f"import os, sys; os.mkdir({str(tmp_path / 'first')!r})"  # the second of two cannot
    assert crew.work(["-c", script], 2, ONE) == "1 of 2 workers ended well; others did the work of 1 (exit code 1)"
    with pytest.raises(NoneLeft, match=r"no worker is left: killed by SIGKILL, killed by SIGKILL; what is done stays"):
        crew.work(["-c", "import os; os.kill(os.getpid(), 9)"], 2, ONE)


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (3, 3), (-9, BUG)])
def test_a_crew_ends_as_its_workers_did(code: int, expected: int) -> None:
    assert NoneLeft([code, code]).code == expected


def test_workers_of_this_machine_share_its_cores_and_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Placement(1, "cuda", 1000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [crew.environment(i, 3, many)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["4", "6", "4"]
    cores = len(os.sched_getaffinity(0))
    assert crew.environment(0, cores, many)["OMP_NUM_THREADS"] == "1"
    assert crew.environment(0, 1, many)["OMP_NUM_THREADS"] == str(cores)
    assert crew.environment(0, 1, ONE)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 75)])
def test_a_worker_that_is_asked_to_leave_ends_with_what_to_do_next(signum: signal.Signals, code: int) -> None:
    with pytest.raises(SystemExit) as left:
        extract._leave(signum, None)
    assert left.value.code == code


def test_an_order_in_the_store_names_no_folder_of_a_machine(tiny_recipe: Path, root: str) -> None:
    recipe = load(str(tiny_recipe), dotlist=["loader.cache_dir=/nvme"])
    stored = open_store(root).get(f"{extract.ORDERS}/{extract.order(root, recipe, ['train'])}.json")
    assert b"nvme" not in stored
