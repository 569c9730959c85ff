"""Giving a batch script to sbatch, and learning which job it has become.

Sites put wrappers around sbatch that say more, or less, than it does. A number that is taken for the job's and is not
leaves the job in the queue and touches another, so an answer counts as a whole line only, and the job's name, which no
other has, finds what an answer does not tell.
"""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core.text import one_line
from jobs.errors import redact
from jobs.slurm import environment, queue
from jobs.slurm.queue import SlurmError

if TYPE_CHECKING:
    from jobs.slurm.script import Script

# A line of --parsable, or the one that sbatch prints where a wrapper drops the option.
ANSWER = re.compile(r"\s*(?:Submitted batch job )?(\d+)(?:(?:;| on cluster )(\S+))?\s*")
SUFFIX = 8  # hexadecimal digits, by which no two submissions give a job the same name
SHOWN = 300  # characters of an answer that is not understood


def submit(made: Script, folder: Path, hold: bool = False) -> str:
    """Give the script to sbatch; returns the job's number.

    Raises SlurmError when SLURM refuses, in its words, and when nobody can tell which job it is: it is cancelled then.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    name = f"{made.directives['job-name']}-{uuid.uuid4().hex[:SUFFIX]}"
    without = [word for variable in environment.foreign(made.directives) for word in ("-u", variable)]

    class Executor(SlurmExecutor):
        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["env", *without, "sbatch", "--parsable", str(submission_file_path)]

        @staticmethod
        def _get_job_id_from_submission_command(string: bytes | str) -> str:
            return _number(string if isinstance(string, str) else string.decode(errors="replace"), name)

    folder.mkdir(parents=True, exist_ok=True)
    options = {key: value or True for key, value in made.directives.items() if key != "job-name"}
    executor = Executor(folder=folder)
    executor.update_parameters(
        job_name=name, use_srun=False, stderr_to_stdout=True, time=None, wckey=None,
        additional_parameters={**options, **({"hold": True} if hold else {})},
    )  # fmt: skip
    try:
        # submitit's own route would pickle a function; what runs here is the script that can be read in slurm/
        return str(executor._submit_command(made.body).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        said = str(error) or getattr(error.__cause__, "output", "") or "nothing"
        left = _withdraw(name)  # after a time-out the controller may have taken the job all the same
        raise SlurmError(f"sbatch refuses the job. SLURM says: {_words(said)}{left and f' ({left})'}") from None


def without_suffix(name: str) -> str:
    """The name that a script gave its job."""
    return re.sub(rf"-[0-9a-f]{{{SUFFIX}}}$", "", name)


def _number(answer: str, name: str) -> str:
    """The job that sbatch, or what stands before it, speaks of.  Raises SlurmError when the job is withdrawn."""
    found = [(match[1], match[2] or "") for line in answer.splitlines() if (match := ANSWER.fullmatch(line))]
    if not found:
        left = _withdraw(name) or f"no job {name} is in the queue"
        said = redact(one_line(answer.strip()))[:SHOWN] or "nothing"
        raise SlurmError(f"the answer of sbatch is not understood ({left}). It says: {said}; wanted is a line NUMBER "
                         "or NUMBER;CLUSTER, as sbatch --parsable prints: look at what wraps sbatch here")  # fmt: skip
    number, cluster = found[-1]
    if len({each for each, _ in found}) > 1 and len(jobs := _named(name)) == 1:
        number = jobs[0]
    if cluster and cluster != (here := _here()):  # whose number means another job here
        left = _cancel([number], f"--clusters={cluster}")
        raise SlurmError(f"sbatch gave the job to cluster {cluster}, and {here or 'another'} answers here ({left}): "
                         f"submit from a login node of {cluster}, or without `clusters`")  # fmt: skip
    return number


def _here() -> str:
    with suppress(SlurmError):
        return queue.cluster_name()
    return ""


def _named(name: str) -> list[str]:
    """Jobs of this name in the queue; of an array the number of the whole."""
    with suppress(SlurmError):
        lines = queue.call("squeue", "--noheader", f"--name={name}", "--format=%F").split()
        return sorted({line for line in lines if line.isdigit()})
    return []


def _withdraw(name: str) -> str:
    """Cancel what waits under this name; returns what has become of it, "" when nothing is found."""
    jobs = _named(name)
    return _cancel(jobs) if jobs else ""


def _cancel(jobs: list[str], *where: str) -> str:
    told = f"job {' '.join(jobs)}"
    try:
        queue.call("scancel", *where, *jobs)
    except SlurmError:
        return f"{told} is still in its queue: {' '.join(['scancel', *where, *jobs])}"
    return f"{told} is cancelled"


def _words(text: str) -> str:
    lines = [line for line in redact(text).splitlines() if line.startswith("sbatch: ")]
    return " ".join(line.removeprefix("sbatch: ") for line in lines) or redact(text).strip()
