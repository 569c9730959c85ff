"""SLURM's answers, as real ones read, in states that are hard to bring about."""

from __future__ import annotations

import pytest

from jobs.errors import NotReady
from jobs.slurm import queue
from jobs.slurm.queue import Job, SlurmError
from tests.jobs.slurm.conftest import Says

INF = float("inf")
PARTITION = (
    "PartitionName={name} AllowGroups=ALL Default={default} DefaultTime=NONE GraceTime=10 MaxNodes={most} "
    "MaxTime={time} MinNodes=0 Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE State={state} TotalCPUs=4 TotalNodes=16"
)


@pytest.mark.parametrize(
    ("line", "words"),
    [("PENDING|Resources||1:00:00", "PENDING (Resources)"),
     ("PENDING|QOSMaxGRESPerUser||1:00:00", "PENDING (QOSMaxGRESPerUser)"),
     ("PENDING|launch failed requeued held||UNLIMITED", "PENDING (launch failed requeued held)"),
     ("RUNNING|None|gpu[01-04]|23:59:10", "RUNNING on gpu[01-04], 23:59:10 left"),
     ("COMPLETING|None|gpu07|0:00", "COMPLETING on gpu07, 0:00 left"),
     ("CONFIGURING|None|cloud-[1-8]|59:00", "CONFIGURING on cloud-[1-8], 59:00 left"),
     ("SUSPENDED|None|gpu01|5:00", "SUSPENDED on gpu01, 5:00 left")],
)  # fmt: skip
def test_a_job_in_the_queue_is_told_in_slurm_s_words(says: Says, line: str, words: str) -> None:
    says("squeue", f"{line}\n")
    assert str(queue.find("7")) == words


@pytest.mark.parametrize("error", ["slurm_load_jobs error: Invalid job id specified\n", ""])
def test_a_job_that_is_not_in_the_queue_is_none(says: Says, error: str) -> None:
    says("squeue", "", error, code=1 if error else 0)
    assert queue.find("7") is None


def test_an_answer_that_does_not_come_is_no_answer(says: Says) -> None:
    says("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", code=1)
    with pytest.raises(SlurmError, match=r"SLURM says: .*Unable to contact slurm controller"):
        queue.find("7")


@pytest.mark.parametrize(
    ("rows", "words"),
    [("TIMEOUT|0:0\n", "TIMEOUT (exit code 0:0)"), ("NODE_FAIL|1:0\n", "NODE_FAIL (exit code 1:0)"),
     ("CANCELLED by 1000|0:15\n", "CANCELLED by 1000 (exit code 0:15)"),
     ("OUT_OF_MEMORY|0:125\n", "OUT_OF_MEMORY (exit code 0:125)"),
     ("REQUEUED|0:0\nBOOT_FAIL|0:0\n", "BOOT_FAIL (exit code 0:0)")],
)  # fmt: skip
def test_how_a_job_ended_comes_from_accounting(says: Says, rows: str, words: str) -> None:
    says("sacct", rows)
    assert queue.ended("7") == words


def test_without_accounting_the_controller_is_asked_while_it_remembers(says: Says) -> None:
    says("sacct", "", "Slurm accounting storage is disabled\n", code=1)
    says("scontrol", "JobId=7 JobName=x UserId=a(1) JobState=DEADLINE Reason=DeadLine ExitCode=0:0 Restarts=2\n")
    assert queue.ended("7") == "DEADLINE (exit code 0:0)"
    says("scontrol", "", "slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert queue.ended("7") == ""
    assert queue.tries("7") == []


def test_every_start_of_a_job_is_known_where_accounting_is_on(says: Says) -> None:
    says("sacct", "NODE_FAIL\nPREEMPTED\nRUNNING\n")
    assert queue.tries("7") == ["NODE_FAIL", "PREEMPTED", "RUNNING"]


def test_a_partition_s_limits_are_those_of_its_largest_node(says: Says) -> None:
    says(
        "scontrol", PARTITION.format(name="gpu", default="YES", most="UNLIMITED", time="2-12:00:00", state="UP") + "\n"
    )
    says("sinfo", "gpu:h100:8(S:0-1)|96|1031000\ngpu:a100:4,gpu:h100:2|64+|515000+\n(null)|8|1000\n")
    found = queue.partition("")
    assert (found.name, found.nodes, found.max_nodes, found.max_time_min) == ("gpu", 16, INF, 3600)
    assert found.gpus_per_node == {"h100": 8, "a100": 4, "": 8}
    assert (found.cpus_per_node, found.mem_mb_per_node) == (96, 1031000)


def test_a_cluster_without_default_partition_wants_one_named(says: Says) -> None:
    says("scontrol", PARTITION.format(name="gpu", default="NO", most="4", time="UNLIMITED", state="DOWN") + "\n")
    says("sinfo", "")
    with pytest.raises(SlurmError, match="no default partition, so one must be named; this cluster has gpu"):
        queue.partition("")
    assert (queue.partition("gpu").max_nodes, queue.partition("gpu").state) == (4, "DOWN")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("UNLIMITED", INF), ("1-00:00:00", 1440), ("2-3", 3060), ("2-03:30", 3090), ("01:30:30", 90.5), ("30:00", 30),
     ("45", 45)],
)  # fmt: skip
def test_times_are_read_as_slurm_writes_them(text: str, minutes: float) -> None:
    assert queue.minutes(text) == minutes


@pytest.mark.parametrize(
    ("gres", "counts"),
    [("gpu:8", {"": 8}), ("gpu:h100:8(S:0-1)", {"h100": 8, "": 8}), ("(null)", {}), ("craynetwork:4,gpu:2", {"": 2}),
     ("gpu:a100_3g.20gb:6(S:0)", {"a100_3g.20gb": 6, "": 6}), ("mps:100", {}),
     ("gpu:4", {"": 4}), ("gpu:h100:4(S:0-1)", {"h100": 4, "": 4}), ("gpu:2080ti:4", {"2080ti": 4, "": 4}),
     ("gpu:2080ti:4(S:0,1)", {"2080ti": 4, "": 4}), ("gpu:1g.10gb:7", {"1g.10gb": 7, "": 7}),
     ("gpu:4090:2,gpu:3090:1", {"4090": 2, "3090": 1, "": 3}), ("gpu:a100:0", {"a100": 0, "": 0}),
     ("gpu:1g.10gb:7(S:0),gpu:3g.40gb:2(S:1),gpu:a100:1,mps:a100:400", {"1g.10gb": 7, "3g.40gb": 2, "a100": 1, "": 10}),
     ("gpu:a100_1g.5gb:7", {"a100_1g.5gb": 7, "": 7}), ("gpu:rtx-6000:2(IDX:0-1)", {"rtx-6000": 2, "": 2}),
     ("gpu:no_consume:4", {"": 4}), ("gpu:tesla:no_consume:4", {"tesla": 4, "": 4}), ("gpu", {"": 1}),
     ("gpu:tesla", {"tesla": 1, "": 1}), ("shard:gpu:8", {}), ("", {})],
)  # fmt: skip
def test_gpus_are_counted_by_type(gres: str, counts: dict[str, int]) -> None:
    assert queue.gres_counts(gres) == counts


def test_a_machine_without_slurm_says_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not queue.answers()
    with pytest.raises(NotReady, match="submit from a login node"):
        queue.call("squeue")


def test_secrets_in_what_slurm_says_are_blotted_out(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    says("sinfo", "", "error: very-secret-value\n", code=1)
    with pytest.raises(SlurmError) as caught:
        queue.call("sinfo")
    assert "very-secret-value" not in str(caught.value)


def test_a_waiting_job_has_no_nodes_to_name() -> None:
    assert str(Job("RUNNING", "None", "", "1:00")) == "RUNNING on no node, 1:00 left"
