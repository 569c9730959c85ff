"""Which job a submission has become, by what sbatch, or a site's wrapper of it, answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.slurm import submission
from jobs.slurm.queue import SlurmError
from jobs.slurm.script import Script
from tests.jobs.slurm.conftest import Says

Asked = Callable[[], list[str]]
MADE = Script({"job-name": "retort-demo-1", "account": "me"}, "#!/bin/bash\nexit 0\n")


@pytest.fixture
def cluster(says: Says) -> Says:
    says("scancel")
    says("scontrol", "ClusterName = toy\n")
    return says


@pytest.mark.parametrize(
    "answer",
    ["4242\n", "4242;toy\n", "Submitted batch job 4242\n", "Submitted batch job 4242 on cluster toy\n", "  4242  \n",
     "Checked job 17 against the rules of job class 3.\n17 hours are left\n4242\n",
     "Your last job 17 ended well\nSubmitted batch job 4242\nThank you for using job 99\n"],
)  # fmt: skip
def test_the_job_is_the_last_line_that_is_a_number(cluster: Says, asked: Asked, tmp_path: Path, answer: str) -> None:
    cluster("sbatch", answer)
    assert submission.submit(MADE, tmp_path / "logs", hold=True) == "4242"
    assert "sbatch --parsable /" in (tmp_path / "bin" / "asked").read_text()
    assert not [line for line in asked() if line.startswith("scancel")]


def test_of_several_numbers_it_is_the_one_that_the_queue_knows_by_name(cluster: Says, tmp_path: Path) -> None:
    cluster("sbatch", "4242\n120\n")
    assert submission.submit(MADE, tmp_path) == "120"
    cluster("squeue", "4242\n")
    assert submission.submit(MADE, tmp_path) == "4242"


def test_a_name_is_given_once(cluster: Says, tmp_path: Path) -> None:
    cluster("sbatch", "1\n")
    submission.submit(MADE, tmp_path)
    cluster("sbatch", "2\n")
    submission.submit(MADE, tmp_path)
    names = {line for path in tmp_path.glob("*_submission.sh") for line in path.read_text().splitlines()
             if line.startswith("#SBATCH --job-name=retort-demo-1-")}  # fmt: skip
    assert len(names) == 2


@pytest.mark.parametrize(
    "answer", ["", "thank you\n", "Job <4242> is submitted to queue <normal>.\n", "job 17 was yours\n"]
)
def test_a_job_that_no_answer_names_is_found_by_its_name_and_cancelled(
    cluster: Says, asked: Asked, tmp_path: Path, answer: str
) -> None:
    cluster("sbatch", answer)
    cluster("squeue", "99\n99\n")
    with pytest.raises(SlurmError, match=r"sbatch is not understood \(job 99 is cancelled\)\. It says: .*wraps sbatch"):
        submission.submit(MADE, tmp_path, hold=True)
    (looked,) = [line for line in asked() if line.startswith("squeue")]
    assert "--name=retort-demo-1-" in looked
    assert [line for line in asked() if line.startswith("scancel")] == ["scancel 99"]


def test_when_the_queue_does_not_tell_either_the_name_is_said(cluster: Says, asked: Asked, tmp_path: Path) -> None:
    cluster("sbatch", "thank you\n")
    with pytest.raises(SlurmError, match=r"no job retort-demo-1-[0-9a-f]{8} is in the queue"):
        submission.submit(MADE, tmp_path)
    assert not [line for line in asked() if line.startswith("scancel")]


def test_a_job_that_was_queued_though_sbatch_failed_does_not_stay(cluster: Says, asked: Asked, tmp_path: Path) -> None:
    cluster("sbatch", "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n", 1)
    cluster("squeue", "99\n")
    with pytest.raises(SlurmError, match=r"Socket timed out on send/recv operation \(job 99 is cancelled\)"):
        submission.submit(MADE, tmp_path)
    assert asked()[-1] == "scancel 99"


def test_a_job_of_another_cluster_is_cancelled_there(cluster: Says, asked: Asked, tmp_path: Path) -> None:
    cluster("sbatch", "4242;far\n")
    with pytest.raises(SlurmError, match="gave the job to cluster far, and toy answers here"):
        submission.submit(MADE, tmp_path)
    assert asked()[-1] == "scancel --clusters=far 4242"


def test_an_outer_step_and_the_shell_s_options_do_not_reach_sbatch(
    cluster: Says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "1", "SRUN_DEBUG": "3",
             "SBATCH_PARTITION": "debug", "SBATCH_ACCOUNT": "other", "SBATCH_QOS": "mine",
             "SLURM_CONF": "/c"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    own = tmp_path / "bin" / "sbatch"
    own.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\necho 1\n")
    submission.submit(MADE, tmp_path / "logs")
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert {name for name in seen if name in given} == {"SLURM_CONF", "SBATCH_QOS"}, "the script names an account"
    assert seen["PATH"] == os.environ["PATH"]
