"""The variables that SLURM's commands see: a submission means what its script says, wherever it is typed.

A step or an allocation (srun, salloc) leaves its own shape in SLURM_*: a job submitted from inside would bind its ranks
to the CPUs of the outer one. SBATCH_*, SQUEUE_* and the like are options that outrank a script or hide jobs.
"""

from __future__ import annotations

import os
from collections.abc import Collection

OWN = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
REACHES = ("SLURM_CONF", "SLURM_JWT")  # which controller answers, and to whom
PAYS = {"SBATCH_ACCOUNT": "account", "SBATCH_QOS": "qos", "SBATCH_WCKEY": "wckey"}  # a user's own, unless a script says
# In a batch script the job's own SLURM_* must stay. These are never its own: they come from a step around sbatch.
OF_A_STEP = ("SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_STEP",
             "SLURM_SRUN_", "SLURM_PTY_", "SLURM_LAUNCH_", "SLURM_UMASK", "SLURM_EXACT", "SLURM_WHOLE",
             "SLURM_OVERLAP", "SLURM_KILL_BAD_EXIT", "SLURM_WAIT", "SLURM_STDINMODE", "SLURM_STDOUTMODE",
             "SLURM_STDERRMODE", "SLURM_LABELIO")  # fmt: skip


def foreign(stated: Collection[str] = ()) -> list[str]:
    """This process's variables that would turn what SLURM's commands do.  stated: options that a script names."""
    kept = {*REACHES, *(name for name, option in PAYS.items() if option not in stated)}
    return sorted(name for name in os.environ if name.startswith(OWN) and name not in kept)


def clean() -> dict[str, str]:
    """This process's variables without those."""
    away = set(foreign())
    return {name: value for name, value in os.environ.items() if name not in away}


def of_a_step() -> list[str]:
    """What to unset in a batch script, where it was submitted by hand from inside a step, as words of bash."""
    return [f'"${{!{prefix}@}}"' for prefix in OF_A_STEP]
