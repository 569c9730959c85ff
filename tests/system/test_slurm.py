"""Runs on a real SLURM: two nodes with an address each, accounting, preemption, and every way in which jobs end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from core.config import load
from core.merge import ConfigError
from jobs import launchers
from jobs.cluster import load as load_cluster
from jobs.errors import JobError
from jobs.record import Run, State
from tests.cli import REPOSITORY, Shell, run_id, wait_for
from tests.conftest import Slurm
from tests.system.stored_features import FeatureSite
from tests.toy_run import LONG, SHORT, SMOKE, losses

pytestmark = pytest.mark.system


class Site:
    """A user's folder and store, and the cluster that they submit to."""

    def __init__(self, folder: Path, slurm: Slurm, store: str = "") -> None:
        self.root, self.slurm = store or f"file://{folder}/store", slurm
        self.shell = Shell(folder, RETORT_STORE=self.root, RETORT_CLUSTER="", **slurm.env)

    def submit(self, *arguments: str, steps: str = SHORT, code: int = 0) -> str:
        return self.shell("submit", "demo", *SMOKE, steps, "--launcher", "slurm", *arguments, code=code)

    def make(self, verb: str, *variables: str) -> str:
        """As a person types it; returns the run's id."""
        command = ["make", "--no-print-directory", "-C", str(REPOSITORY), verb, "RECIPE=demo", "LAUNCHER=slurm"]
        done = subprocess.run([*command, "PROFILE=smoke", f"STORE={self.root}", *variables], env=self.shell.env,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return run_id(done.stdout)

    def run(self, name: str) -> Run:
        return Run(self.root, name)

    def job(self, name: str) -> str:
        run = self.run(name)
        return str(run.handle(run.last())["job"])

    def ranks(self, name: str) -> list[int]:
        """Processes that train, those of the first node first."""
        return [pid for node in (1, 2) for pid in self.slurm.processes(node) if _is_rank(pid, name)]

    def losses(self, name: str) -> dict[int, float]:
        return losses(self.root, name)

    def trains(self, name: str, attempt: int) -> None:
        """Wait until this attempt has made some steps."""

        def working() -> bool:
            beat = self.run(name).view().heartbeat
            return bool(beat.get("attempt") == attempt and beat.get("step"))

        wait_for(f"attempt {attempt} at work", working)

    def ends(self, name: str, state: State = State.SUCCEEDED) -> None:
        wait_for(f"{name} {state}", lambda: self.run(name).last().state == state)

    def leaves(self, job: str) -> None:
        wait_for(f"job {job} out of the queue", lambda: not self.slurm.run("squeue", "--noheader", f"--jobs={job}"))

    def limit(self, job: str, left_s: int) -> None:
        """Have a job end at the first full minute of its time that is so far away."""
        minutes, seconds = self.slurm.run("squeue", "--noheader", "--format=%M", f"--jobs={job}").split(":")
        limit = int(minutes) + (int(seconds) + left_s + 59) // 60
        self.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def sacct(self, job: str) -> list[str]:
        """How each start of a job ended, oldest first."""
        out = self.slurm.run(
            "sacct", "-D", "-X", "-n", "-P", f"--jobs={job}", "--format=State,ExitCode,Elapsed,NodeList"
        )
        print(f"$ sacct -D -X --jobs={job}\n{out}")
        return [re.split(r"[ |]", line)[0] for line in out.splitlines()]


def _is_rank(pid: int, name: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return "jobs.worker" in words and name in words and not words[0].endswith("srun")


@pytest.fixture
def site(tmp_path: Path, slurm: Slurm) -> Site:
    return Site(tmp_path, slurm)


def test_a_run_goes_through_whatever_slurm_does_to_it_and_computes_the_same(
    site: Site, whole: dict[int, float]
) -> None:
    cluster = site.shell.folder / "site.yaml"
    cluster.write_text("time_min: 9\n")
    name = run_id(site.submit("--cluster", str(cluster), "--detach", steps=f"{LONG} launch.grace_s=25"))
    job, slurm = site.job(name), site.slurm

    site.trains(name, 1)
    site.limit(job, 45)  # launch.grace_s and a minute before its end a job is signalled
    wait_for("the time limit's signal", lambda: site.run(name).last().attempt == 2)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    site.trains(name, 2)
    shown = site.shell("status", name)
    assert f"SLURM job {job} RUNNING on rn[1-2]" in shown
    assert re.search(r"progress .*step \d+/320, loss .* img/s.* ETA", shown)
    os.kill(site.ranks(name)[-1], signal.SIGUSR1)  # of the second node only
    site.trains(name, 3)
    slurm.run("scontrol", "requeue", job)
    site.trains(name, 4)
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    site.trains(name, 5)
    slurm.kill_node(2)
    lost = ("sinfo", "--noheader", "--Node", "--states=down,no_respond", "--format=%N")
    wait_for("SLURM to notice", lambda: "rn2" in slurm.run(*lost))
    slurm.start_node(2)
    site.ends(name)
    site.leaves(job)

    assert site.losses(name) == whole, "bit for bit"
    moves = [(t.state, t.attempt, t.info.get("reason", "")) for t in site.run(name).transitions()]
    ends = [(state, reason) for state, _, reason in moves if state in (State.PREEMPTED, State.FAILED)]
    assert [attempt for state, attempt, _ in moves if state == State.QUEUED] == [1, 2, 3, 4, 5, 6]
    assert ends[0] == (State.PREEMPTED, "asked to stop (SIGUSR2 received)")
    assert ends[1] == (State.PREEMPTED, "asked to stop (by another rank: its log says why)")
    assert ends[2] == ends[3] == (State.PREEMPTED, "asked to stop (SIGTERM received)")
    assert "connection" in ends[4][1].lower() or "SLURM ended the job" in ends[4][1]
    wait_for("accounting", lambda: site.sacct(job)[-1] == "COMPLETED")
    assert len(site.sacct(job)) == 6
    told = site.shell("status", name)
    assert "preempted (attempt 1): asked to stop (SIGUSR2 received)" in told
    assert "attempt 6 went on from step" in told
    logs = site.shell("logs", name, "--rank", "1", "--follow")
    assert "rank-0001.log" in logs
    assert "rank-0000.log" not in logs
    assert re.search(r"rank 1 of 2 on rn2 .*MASTER_ADDR=10\.88\.\d+\.11 .*GLOO_SOCKET_IFNAME=eth0", logs)


def test_cancel_takes_a_waiting_run_from_the_queue_and_lets_a_working_one_save(site: Site) -> None:
    name = run_id(site.submit("--detach", steps=LONG.replace("320", "4000")))
    job = site.job(name)
    site.trains(name, 1)
    waiting = run_id(site.submit("--detach", "--set", "seed=1", "--after", "export"))
    site.slurm.run("scontrol", "hold", site.job(waiting))
    site.shell("cancel", waiting)
    site.leaves(site.job(waiting))
    assert not site.slurm.run("squeue", "--noheader", "--name", f"retort-{waiting}"), "nor is its export left"
    reached = max(site.losses(name), default=0)
    assert "ended" in site.shell("cancel", name)
    site.leaves(job)
    wait_for("accounting", lambda: site.sacct(job) == ["CANCELLED"])
    assert site.run(name).last().state == State.CANCELLED
    steps = [each["step"] for each in site.shell.status(name)["checkpoints"]]
    assert max(steps) >= reached, "what had been trained is kept"
    assert site.run(waiting).last().state == State.CANCELLED


def test_a_sweep_submits_what_is_missing_as_an_array_and_shows_what_came_of_it(site: Site) -> None:
    cluster = site.shell.folder / "site.yaml"
    cluster.write_text(f"logs: {site.shell.folder}/logs\n")
    steps = f"{LONG.replace('320', '90')} launch.ranks=1 evaluate.protocols=[knn]"  # enough to be signalled on the way
    first = site.make("submit", f"CLUSTER={cluster}", f"SET={steps} train.lr=1e-3")
    sweep = ("--sweep", "train.lr=1e-3,2e-3,3e-3", "--after", "eval,export")
    out = site.submit(*sweep, steps=steps)
    assert f"{first} is already done" in out
    name = out.strip().splitlines()[-1].removeprefix("sweep: ")
    runs = [line.split(":")[0] for line in out.splitlines() if "attempt 1 submitted" in line]
    assert len(runs) == 2
    assert re.fullmatch(r"\d+_0", site.job(runs[0]))
    assert site.job(runs[1]) == site.job(runs[0]).replace("_0", "_1")
    site.trains(runs[1], 1)
    site.slurm.run("scancel", "--signal=USR2", site.job(runs[1]))  # its number is the array's own
    for run, attempts in zip(runs, (1, 2), strict=True):
        site.ends(run)
        assert site.run(run).last().attempt == attempts, "of an array only the task that was told starts again"
        wait_for("export", lambda run=run: site.run(run).store.size("export/model.safetensors"))
        wait_for("evaluation", lambda run=run: site.run(run).store.size("evaluations/knn.json"))
    table = site.shell("status", "--sweep", name)
    assert re.search(rf"{runs[0]}\s+2e-3\s+succeeded\s+1\s+90\s+[\d.]+\s+[\d.]+", table), table
    assert "knn top1" in table
    before = site.slurm.run("sacct", "-X", "-n", "-P", "--format=JobID")
    again = site.submit(*sweep, steps=steps)
    assert again.count("is already done") == 3
    assert site.slurm.run("sacct", "-X", "-n", "-P", "--format=JobID") == before, "nothing is submitted twice"


def test_a_rendered_script_submitted_by_hand_ends_in_the_same_record(site: Site) -> None:
    out = site.shell("manifests", "demo", *SMOKE, f"{SHORT} launch.ranks=1", "--launcher", "slurm")
    name, path = run_id(out), Path(out.splitlines()[-3])
    try:
        job = site.slurm.run("sbatch", "--parsable", str(path))
        site.ends(name)
        site.leaves(job)
        assert site.job(name) == job
        assert [t.state for t in site.run(name).transitions()] == ["created", "queued", "running", "succeeded"]
        again = site.slurm.run("sbatch", "--parsable", str(path))
        site.leaves(again)
        wait_for("accounting", lambda: site.sacct(again) == ["COMPLETED"])
        assert site.run(name).last().number == 3, "it found nothing to do"
    finally:
        path.unlink()


def test_of_submissions_at_once_one_works_and_a_job_that_vanished_is_found(site: Site) -> None:
    site.slurm.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    outs: list[str] = []
    both = [threading.Thread(target=lambda: outs.append(site.submit("--detach"))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    name = run_id(outs[0])
    assert run_id(outs[1]) == name
    assert sorted("is already queued" in out for out in outs) == [False, True]
    assert site.slurm.run("squeue", "--noheader", "--format=%i", f"--name=retort-{name}") == site.job(name)
    assert f"SLURM job {site.job(name)} PENDING" in site.submit("--detach"), "and the existing one is shown"
    site.slurm.run("scancel", site.job(name))
    site.leaves(site.job(name))
    told = site.shell("status", name)
    assert re.search(r"state +lost", told)
    assert re.search(r"reason +SLURM job \d+ is CANCELLED", told)
    assert f"make resume RUN={name}" in told
    site.slurm.clear()
    site.shell("resume", name, "--launcher", "slurm")
    assert site.run(name).last().state == State.SUCCEEDED


def test_a_node_that_does_not_reach_the_store_says_so_before_anything_is_loaded(
    tmp_path: Path, slurm: Slurm, bucket: str
) -> None:
    site = Site(tmp_path, slurm, bucket)  # its server listens on this machine's loopback, which no node sees
    name = run_id(site.submit("--detach", "--set", "launch.max_attempts=1"))
    site.leaves(site.job(name))
    told = site.shell("status", name)
    assert re.search(r"reason +SLURM job \d+ is FAILED", told)
    assert "error: node rn1: store: " in told
    assert "error: node rn2: store: " in told
    assert "no answer from 127.0.0.1" in told
    wait_for("accounting", lambda: site.sacct(site.job(name)) == ["FAILED"])  # and it is not tried again


@pytest.mark.parametrize(
    ("cluster", "ranks", "words"),
    [("partition: nowhere", 1, "there is no partition 'nowhere'; this cluster has closed, high, main, short"),
     ("partition: closed", 1, "partition closed is DOWN"),
     ("gpus_per_node: 4", 4, "4 GPUs on a node are wanted; nodes of partition main have 2 at most"),
     ("{gpus_per_node: 1, gpu_type: h100}", 1, "1 h100 on a node are wanted; nodes of partition main have 0"),
     ("{partition: short, time_min: 30}", 1, "30 minutes are wanted; partition short allows 2 at most"),
     ("partition: short", 1, "jobs end after 2 minutes, and 180 s of them are for saving"),
     ("mem_gb: 64", 1, "64 GB on a node are wanted; nodes of partition main have 4 at most"),
     ("cpus_per_task: 8", 1, "1 ranks of 8 CPUs need 8 on a node; nodes of partition main have 2"),
     ("{}", 4, "4 ranks need 4 nodes of 1; partition main gives a job 2 at most"),
     ("shared: [/nowhere]", 1, "the nodes do not see"),
     ("python: /nowhere/python", 1, "there is no /nowhere/python here"),
     ("{container: apptainer, image: /nowhere.sif}", 1, "there is no file /nowhere.sif")],
)  # fmt: skip
def test_what_slurm_would_not_do_is_refused_in_clear_words(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, cluster: str, ranks: int, words: str
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    path = tmp_path / "site.yaml"
    path.write_text(cluster)
    launcher = launchers.find("slurm").at(load_cluster(str(path)))
    recipe = load("demo", dotlist=[f"launch.ranks={ranks}", "launch.device=auto", "train.micro_batch=16"])
    with pytest.raises((JobError, ConfigError), match=re.escape(words)):
        launcher.check(recipe, f"file://{tmp_path}/store", launcher.place(recipe))


def test_what_sbatch_refuses_is_told_in_its_own_words_and_leaves_nothing(site: Site) -> None:
    path = site.shell.folder / "site.yaml"
    path.write_text("extra: {nodelist: rn7}")
    out = site.submit("--cluster", str(path), "--detach", code=3)
    assert "sbatch refuses the job. SLURM says: error: " in out
    assert "rn7" in out or "node" in out.lower()
    assert not site.slurm.run("squeue", "--noheader")


# ---- teacher outputs


def test_tasks_of_a_slurm_array_share_the_work_though_one_is_preempted_and_one_is_killed(
    tmp_path: Path, slurm: Slurm
) -> None:
    site = FeatureSite(tmp_path, f"file://{tmp_path}/store", slurm.env)
    out = site.features("--launcher", "slurm", "--nproc", "3")
    job = re.search(r"SLURM job (\d+): 3 workers; squeue --jobs=\1 shows them, scancel \1 ends them", out)
    assert job
    site.begun()
    slurm.run("scontrol", "requeue", f"{job[1]}_0")
    slurm.run("scancel", "--signal=USR2", f"{job[1]}_1")  # as its time limit does: it starts itself again
    slurm.run("scancel", f"{job[1]}_2")
    wait_for("the array's end", lambda: not slurm.run("squeue", "--noheader", f"--jobs={job[1]}"), 400)
    wait_for("accounting", lambda: _ends(slurm, job[1]) == {"0": "COMPLETED", "1": "COMPLETED", "2": "CANCELLED"})
    site.is_whole()


def _ends(slurm: Slurm, job: str) -> dict[str, str]:
    """How the tasks of an array ended in the end."""
    out = slurm.run("sacct", "-X", "-n", "-P", f"--jobs={job}", "--format=JobID,State")
    found = (re.match(r"\d+_(\d+)\|(\w+)", line) for line in out.splitlines())
    return {match[1]: match[2] for match in found if match}
