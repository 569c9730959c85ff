"""What a machine has run out of is said as that, with what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from core import shortage
from core.storage import StoreError, open_store


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def number(code: int, path: str = "/a/b") -> OSError:
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (MemoryError(), "memory", "loader.workers"),
        (number(errno.ENOMEM), "memory", "mem_gb"),
        (RuntimeError("[enforce fail at x.cpp] DefaultCPUAllocator: can't allocate memory"), "memory", "micro_batch"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "memory", "loader.workers"),
        (RuntimeError("Caught MemoryError in DataLoader worker process 0.\nTraceback\nMemoryError"), "memory", "lower"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the device's memory", "train.micro_batch"),
        (number(errno.EMFILE), "the limit of open files", "ulimit -n"),
        (number(errno.ENFILE), "the limit of open files", "ulimit -n"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
         "the limit of open files", "ulimit -n"),
        (RuntimeError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 24] Too many open files: 'a'"),
         "the limit of open files", "ulimit -n"),
        (number(errno.ENOSPC, "/dev/shm/torch_1"), "/dev/shm", "--shm-size"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28) (shm)"), "/dev/shm", "df -h"),
        (RuntimeError("unable to allocate shared memory(shm) for file </t>: No space left on device (28)"),
         "/dev/shm", "kubernetes.shm_gb"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "/dev/shm", "loader.workers"),
        (number(errno.ENOSPC), "the disk", "TMPDIR"),
        (RuntimeError("can't start new thread"), "the limit of processes and threads", "ulimit -u"),
    ],
)  # fmt: skip
def test_it_is_named_with_a_remedy(error: Exception, what: str, remedy: str) -> None:
    told = shortage.told(error)
    assert told.startswith(f"{what} is used up: ")
    assert remedy in told
    assert "\n" not in told


OTHERS = [ValueError("Too many open files"), RuntimeError("shape mismatch"), KeyError("memory"),
          FileNotFoundError(2, "x", "/dev/shm/a"), RuntimeError("shared memory of that name")]  # fmt: skip


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert shortage.told(error) == ""


def test_a_store_without_a_file_handle_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*arguments: object, **options: object) -> None:
        raise number(errno.EMFILE)

    monkeypatch.setattr(Path, "read_bytes", out)
    with pytest.raises(StoreError, match="a/b: Too many open files: raise the limit of open files"):
        open_store(f"file://{tmp_path}").get("a/b")
