"""What a machine can run out of, told from the error that says so, with what to do about it."""

from __future__ import annotations

import errno
import re

MEMORY = ("lower train.micro_batch, loader.workers or loader.prefetch, or give the run more memory (mem_gb of a "
          "cluster file)")  # fmt: skip
FILES = "raise the limit of open files (`ulimit -n 65536`, LimitNOFILE of a service), or lower loader.workers"
SHARED = ("`df -h /dev/shm` shows it: give it more (--shm-size of a container, kubernetes.shm_gb of a cluster file), "
          "or lower loader.workers and loader.prefetch")  # fmt: skip
DISK = "free space, or choose another folder (TMPDIR, checkpoint.spool, loader.cache_dir)"
PROCESSES = "raise the limit of processes (`ulimit -u`, pids of a container), or lower loader.workers, launch.threads"
DEVICE = "lower train.micro_batch, or share the state among more ranks (zero.stage, launch.ranks)"
# What is used up, the numbers of errors that say so, what to do, and the words of those without a number: torch's
# loader repeats what its workers have met as text. The first that fits counts.
KINDS = (
    ("the limit of open files", (errno.EMFILE, errno.ENFILE), FILES, r"Too many open files"),
    ("/dev/shm", (), SHARED,
     r"(?s)(?=.*No space left).*(/dev/shm|shared memory|\(shm\))|out of shared memory|signal: Bus"),
    ("the disk", (errno.ENOSPC, errno.EDQUOT), DISK, r"No space left on device|Disk quota exceeded"),
    ("memory", (errno.ENOMEM,), MEMORY,
     r"[Cc]annot allocate memory|can't allocate memory|not enough memory|signal: Killed|\bMemoryError\b"),
    ("the limit of processes and threads", (errno.EAGAIN,), PROCESSES,
     r"can't start new thread|Resource temporarily unavailable"),
)  # fmt: skip


def told(error: BaseException) -> str:
    """What is used up and what to do, in a line; "" when the error says something else."""
    names = {kind.__name__ for kind in type(error).__mro__}
    said = (str(error).strip().splitlines() or [""])[-1]
    if "OutOfMemoryError" in names:  # torch's, which need not be there
        return f"the device's memory is used up: {DEVICE} ({said})"
    if isinstance(error, MemoryError):
        return f"memory is used up: {MEMORY}"
    if not isinstance(error, OSError | RuntimeError):
        return ""
    number, text = getattr(error, "errno", None), str(error)
    for what, numbers, remedy, words in KINDS:
        if number in numbers or re.search(words, text):
            return f"{what} is used up: {remedy} ({said})"
    return ""
