"""The launcher against recorded answers: what a cluster gives, and what is left behind when something goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import load
from core.recipe import Recipe
from core.storage import StoreError, open_store
from jobs import cli, doctor, inputs
from jobs.cluster import Cluster
from jobs.launchers import Order
from jobs.launchers.slurm import Slurm
from jobs.placement import Placement
from jobs.record import Run, State
from jobs.settings import Settings
from jobs.slurm import queue
from jobs.slurm.queue import SlurmError
from tests.jobs.slurm.conftest import Says

MakeRun = Callable[..., Run]
Asked = Callable[[], list[str]]
ONE = Placement(1, "cpu", 1)


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return load(str(tiny_recipe))


@pytest.fixture
def slurm(says: Says, tmp_path: Path) -> Slurm:
    says("srun")
    says("sbatch", "Submitted batch job 12\n")
    says("scancel")
    says("scontrol", "ClusterName = toy\n")
    return Slurm(Cluster(logs=str(tmp_path / "logs")))


def test_a_run_may_have_more_gpus_than_a_node(root: str, tiny_recipe: Path) -> None:
    recipe = load(str(tiny_recipe), dotlist=["launch.device=cuda", "launch.ranks=16", "train.batch=32"])
    launcher = Slurm(Cluster(gpus_per_node=8))
    assert launcher.place(recipe).nodes == 2
    assert not inputs.missing(recipe, root, launcher.gpus())
    assert inputs.missing(recipe, root, Slurm(Cluster()).gpus()), "and none where nodes have none"


def test_a_job_is_held_until_the_record_names_it(slurm: Slurm, new_run: MakeRun, recipe: Recipe, asked: Asked) -> None:
    run = new_run()
    assert slurm.submit([Order(run, recipe, 1, {})], ONE) == [True]
    assert run.handle(run.last())["job"] == "12"
    assert "#SBATCH --hold" in next((Path(slurm.cluster.logs)).glob("12_submission.sh")).read_text()
    assert asked()[-1] == "scontrol release 12"


def test_members_of_an_array_that_somebody_else_has_are_taken_out(
    slurm: Slurm, new_run: MakeRun, recipe: Recipe, asked: Asked
) -> None:
    free, taken = new_run("demo-1"), new_run("demo-2")
    taken.move(State.QUEUED, 1, launcher="slurm", job="3")
    assert slurm.submit([Order(free, recipe, 1, {}), Order(taken, recipe, 1, {})], ONE) == [True, False]
    assert free.handle(free.last())["job"] == "12_0"
    assert asked()[-2:] == ["scancel -- 12_1", "scontrol release 12"]


def test_nothing_stays_held_when_submitting_breaks_off(
    slurm: Slurm, new_run: MakeRun, recipe: Recipe, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new_run("demo-1"), new_run("demo-2")

    def away(*arguments: object, **info: object) -> None:
        raise StoreError("no answer")

    monkeypatch.setattr(second, "move", away)
    with pytest.raises(StoreError):
        slurm.submit([Order(first, recipe, 1, {}), Order(second, recipe, 1, {})], ONE)
    assert asked()[-1] == "scancel -- 12"
    assert first.last().state == State.FAILED
    assert "not submitted: no answer" in first.last().info["reason"]


def test_what_sbatch_says_is_quoted_and_nothing_is_recorded(
    slurm: Slurm, new_run: MakeRun, recipe: Recipe, says: Says
) -> None:
    says("sbatch", "", "sbatch: error: Batch job submission failed: Invalid account or account/partition\n", code=1)
    run = new_run()
    with pytest.raises(SlurmError, match="error: Batch job submission failed: Invalid account"):
        slurm.submit([Order(run, recipe, 1, {})], ONE)
    assert run.last().state == State.CREATED


def test_workers_are_one_job_and_it_is_said_how_to_look_at_them(slurm: Slurm, recipe: Recipe, asked: Asked) -> None:
    told = slurm.workers(["-m", "jobs.extract", "--order", "1"], 3, recipe, ONE)
    assert told == ("SLURM job 12: 3 workers; squeue --jobs=12 shows them, scancel 12 ends them; "
                    f"{slurm.cluster.logs}/job-12_*.log")  # fmt: skip
    given = next(Path(slurm.cluster.logs).glob("12_submission.sh")).read_text()
    assert "#SBATCH --array=0-2" in given
    assert "-m jobs.extract --order 1" in given
    assert "--hold" not in given
    assert len(asked()) == 1


def test_features_of_a_store_that_nodes_do_not_see_are_refused_before_anything_is_queued(
    slurm: Slurm, says: Says, tiny_recipe: Path, root: str, asked: Asked, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    says("sinfo", "cpu\n")
    (tmp_path / "site.yaml").write_text("shared: [/shared]\n")
    words = ["features", str(tiny_recipe), "--launcher", "slurm", "--nproc", "4", "--cluster", f"{tmp_path}/site.yaml"]
    assert cli.main([*words, "--store", root]) == 2
    assert f"store: the nodes do not see {root.removeprefix('file://')}" in capsys.readouterr().err
    assert not [line for line in asked() if line.startswith("sbatch")]
    assert not list(open_store(root).list("features/"))


def test_a_job_of_another_cluster_is_not_judged(slurm: Slurm, new_run: MakeRun, says: Says) -> None:
    says("squeue", "")
    run = new_run()
    assert slurm.look(run, {"job": "12", "slurm": "elsewhere"}).alive is None
    assert slurm.look(run, {"job": "13", "slurm": "toy"}).alive is False


def test_slurm_is_not_asked_again_within_seconds(slurm: Slurm, new_run: MakeRun, says: Says, asked: Asked) -> None:
    says("squeue", "RUNNING|None|n1|1:00\n")
    run = new_run()
    for _ in range(5):
        assert slurm.look(run, {"job": "12", "slurm": ""}).alive
    assert len([line for line in asked() if line.startswith("squeue")]) == 1


def test_a_preempted_run_whose_job_waits_is_not_submitted_again(new_run: MakeRun, says: Says) -> None:
    run = new_run()
    run.move(State.QUEUED, 1, launcher="slurm", job="12", slurm="")
    run.move(State.RUNNING)
    run.move(State.PREEMPTED, reason="asked to stop")
    says("squeue", "PENDING|BeginTime||1:00\n")
    assert run.view().active
    says("squeue", "")
    assert not run.view().active


def test_doctor_says_what_the_partition_has(says: Says, tmp_path: Path, root: str) -> None:
    says("scontrol", "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=3\n")
    says("sinfo", "gpu:h100:8|96|1031000\n")
    path = tmp_path / "site.yaml"
    path.write_text("partition: gpu\n")
    assert doctor.scheduler(Settings(cluster=str(path)), None, root) == "partition gpu: 3 nodes, of 96 CPUs and 8 GPUs"


BAD_NUMBERS = ["--user=root", "-u root", "12 --user=root", "12\n13", "12_", "_1", "", "12,13", "12_[0-3]", "1" * 11,
               "\u0663", 12, None, ["12"]]  # fmt: skip


@pytest.mark.parametrize("job", BAD_NUMBERS)
def test_what_is_no_job_s_number_reaches_none_of_slurm_s_programs(
    slurm: Slurm, new_run: MakeRun, asked: Asked, root: str, job: object
) -> None:
    run = new_run()
    run.move(State.QUEUED, 1, launcher="slurm", job=job, after={"eval": job})
    assert "is no number of a SLURM job" in slurm.look(run, run.handle(run.last())).text
    assert not slurm.cancel(run, run.handle(run.last()))
    assert cli.main(["status", "--store", root]) == 0
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert asked() == []


def test_only_jobs_that_bear_the_run_s_name_are_cancelled(
    slurm: Slurm, new_run: MakeRun, says: Says, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    info = {"job": "12", "slurm": "toy"}
    for name in ("somebody-s-thesis", f"retort-{run.id}0", "retort-other-sweep", "PENDING|Resources||1:00"):
        says("squeue", f"{name}\n")
        assert not slurm.cancel(run, info)
    assert not [line for line in asked() if line.startswith("scancel")]
    monkeypatch.setattr(queue, "find", lambda job: queue.Job("RUNNING", "None", "n1", "1:00"))
    for name in (f"retort-{run.id}", "retort-demo-sweep"):
        says("squeue", f"{name}\n")
        assert slurm.cancel(run, {**info, "after": {"report": "--user=root", "eval": "13"}})
        assert [line for line in asked() if line.startswith("scancel")][-2:] == [
            "scancel --signal=TERM -- 12", "scancel -- 13",
        ]  # fmt: skip


def test_a_job_of_another_slurm_is_not_cancelled_here(
    slurm: Slurm, new_run: MakeRun, says: Says, asked: Asked
) -> None:
    run = new_run()
    says("squeue", f"retort-{run.id}\n")
    assert not slurm.cancel(run, {"job": "12", "slurm": "elsewhere"})
    assert not [line for line in asked() if line.startswith("scancel")]


def test_last_words_are_read_in_the_known_folder_only(
    slurm: Slurm, new_run: MakeRun, says: Says, tmp_path: Path
) -> None:
    run = new_run()
    says("squeue", "")
    known = Path(slurm.cluster.logs) / run.id
    for folder in (tmp_path / "private", known):
        folder.mkdir(parents=True)
        (folder / "said-12.log").write_text("error: secret\n")
    assert "secret" not in slurm.look(run, {"job": "12", "slurm": "", "logs": str(tmp_path / "private")}).text
    slurm._looks.forget()
    assert "secret" in slurm.look(run, {"job": "12", "slurm": "", "logs": str(known)}).text
