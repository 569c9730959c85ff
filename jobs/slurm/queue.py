"""SLURM's commands: what is asked of them and how their answers read."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

from jobs.errors import NotReady, redact

ANSWER_S = 30.0
GONE = "Invalid job id"
JOB = re.compile(r"\d{1,10}(_\d{1,10})?", re.ASCII)  # 12, or 12_3 of an array: what SLURM has for a job's number


class SlurmError(NotReady):
    """SLURM refused or did not answer; the message holds its own words."""


@dataclass(frozen=True)
class Job:
    """A job as squeue shows it."""

    state: str  # PENDING, RUNNING, COMPLETING ...
    reason: str
    nodes: str
    left: str  # until its time limit

    def __str__(self) -> str:
        if self.state == "PENDING":
            return f"PENDING ({self.reason})"
        return f"{self.state} on {self.nodes or 'no node'}, {self.left} left"


@dataclass(frozen=True)
class Partition:
    """What a job may ask of a partition."""

    name: str
    nodes: int
    max_nodes: float
    max_time_min: float
    default_time_min: float  # of jobs that name none
    gpus_per_node: dict[str, int]  # most on any node, by type; "" = of any type
    cpus_per_node: int
    mem_mb_per_node: int
    state: str


def call(*command: str) -> str:
    """Standard output of a command of SLURM.  Raises SlurmError with what SLURM said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise SlurmError(
            f"there is no {command[0]} on this machine: submit from a login node of the cluster, or with LAUNCHER=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for {ANSWER_S:.0f} s: is SLURM's controller up?") from None
    if done.returncode != 0:
        words = redact((done.stderr or done.stdout).strip()) or f"exit code {done.returncode}"
        raise SlurmError(f"SLURM says: {words}")
    return done.stdout


def answers() -> bool:
    """Whether this machine can submit to a SLURM."""
    if not shutil.which("sbatch"):
        return False
    try:
        call("sinfo", "--noheader", "--format=%P")
    except SlurmError:
        return False
    return True


@cache
def cluster_name() -> str:
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else ""


def named(job: str) -> str:
    """The name that a job of the queue bears; "" when it has left.  Raises SlurmError."""
    try:
        text = call("squeue", "--noheader", f"--jobs={number(job)}", "--format=%j")
    except SlurmError as error:
        if GONE in str(error):
            return ""
        raise
    return text.strip().partition("\n")[0].strip()


def number(job: object) -> str:
    """A job's number, which a run's record or the environment gave.  Raises SlurmError: it could be an option."""
    if not isinstance(job, str) or not JOB.fullmatch(job):
        raise SlurmError(f"{job!r} is no number of a SLURM job, so SLURM is not asked about it")
    return job


def cancel(*jobs: str, signal: str = "") -> None:
    """Take jobs out of the queue, or signal their tasks.  Raises SlurmError."""
    call("scancel", *([f"--signal={signal}"] if signal else []), "--", *map(number, jobs))


def find(job: str) -> Job | None:
    """A job that waits or works; None when it has left the queue.  Raises SlurmError."""
    try:
        text = call("squeue", "--noheader", f"--jobs={number(job)}", "--format=%T|%r|%N|%L")
    except SlurmError as error:
        if GONE in str(error):
            return None
        raise
    lines = text.strip().splitlines()
    return Job(*lines[0].strip().split("|")) if lines else None


def ended(job: str) -> str:
    """How a job that has left the queue ended, by accounting or while the controller remembers; "" = nobody knows."""
    try:
        text = call("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={number(job)}",
                    "--format=State,ExitCode")  # fmt: skip
        if lines := text.strip().splitlines():
            state, code = lines[-1].split("|")
            return f"{state} (exit code {code})"
    except SlurmError:
        pass
    try:
        found = fields(call("scontrol", "--oneliner", "show", "job", number(job)))
    except SlurmError:
        return ""
    return f"{found.get('JobState', '')} (exit code {found.get('ExitCode', '?')})" if found else ""


def tries(job: str) -> list[str]:
    """How each start of a job ended, oldest first, where accounting is on."""
    try:
        text = call("sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", f"--jobs={number(job)}",
                    "--format=State")  # fmt: skip
    except SlurmError:
        return []
    return text.split("\n")[:-1]


def partition(name: str) -> Partition:
    """A partition by name; "" = the one that jobs go to when they name none.  Raises SlurmError."""
    known = {found["PartitionName"]: found for line in call("scontrol", "--oneliner", "show", "partition").splitlines()
             if "PartitionName" in (found := fields(line))}  # fmt: skip
    default = next((n for n, found in known.items() if found.get("Default") == "YES"), "")
    wanted = name or default
    if wanted not in known:
        lack = f"there is no partition {name!r}" if name else "there is no default partition, so one must be named"
        raise SlurmError(f"partition: {lack}; this cluster has {', '.join(sorted(known)) or 'none'}")
    found = known[wanted]
    rows = [line.split("|") for line in
            call("sinfo", "--noheader", "--Node", f"--partition={wanted}", "--format=%G|%c|%m").split()]  # fmt: skip
    gpus: dict[str, int] = {}
    for gres, _, _ in rows:
        for kind, count in gres_counts(gres).items():
            gpus[kind] = max(gpus.get(kind, 0), count)
    longest = minutes(found["MaxTime"])
    cpus, memory = ([int(row[i].rstrip("+")) for row in rows] for i in (1, 2))
    return Partition(
        wanted, int(found["TotalNodes"]), float(found["MaxNodes"].replace("UNLIMITED", "inf")), longest,
        min(minutes(found.get("DefaultTime", "NONE")), longest), gpus, max(cpus, default=0), max(memory, default=0),
        found.get("State", "UP"),
    )  # fmt: skip


def gres_counts(gres: str) -> dict[str, int]:
    """`gpu:h100:8(S:0-1),gpu:a100:2` -> {"h100": 8, "a100": 2, "": 10}: GPUs by type, and in all under ""."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu(?::([A-Za-z][^:,()]*))?:(\d+)", gres):
        for name in {kind, ""}:
            found[name] = found.get(name, 0) + int(count)
    return found


def minutes(text: str) -> float:
    """`1-02:30:00`, `30:00`, `45` or UNLIMITED, as SLURM writes times -> minutes."""
    if text in ("UNLIMITED", "INFINITE", "NONE"):
        return float("inf")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minute, second = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minute, second = parts
    else:
        hours, minute, second = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return int(days or 0) * 1440 + hours * 60 + minute + second / 60


def fields(line: str) -> dict[str, str]:
    """`A=1 B=2 ...`, as scontrol writes a record in one line."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", line))
