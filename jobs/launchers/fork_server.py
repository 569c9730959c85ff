"""Starts Python programs by forking a process that has imported their packages once.

torch, timm and DeepSpeed take a rank several seconds to import. A supervisor keeps one `ForkServer` for its run: all
ranks, those of later attempts included, are forks of it and share its memory until they write to it.

The programs become children of the process that keeps the server, not of the server: it forks twice, and the keeper is
the subreaper to which Linux hands orphans. So they are waited for, signalled and ended as if the keeper had started
them, and the end of the server touches none of them. The server ends when its keeper does.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


class Forked:
    """A process that `ForkServer` started. Once it has been waited for, its number is never signalled again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def reap(self) -> int:
        """Wait for its end and return its exit code, negative for a signal; one thread calls this."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # from here on the number may be somebody else's
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()
        return self._code

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within so long, as `reap` saw it."""
        return self._ended.wait(timeout_s)

    def signal(self, signum: int) -> None:
        with self._lock:
            if self._code is None:
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it and what it has started, unless it has ended by itself."""
        with self._lock, suppress(ProcessLookupError):
            if self._code is None:
                os.killpg(self.pid, signal.SIGKILL)


class ForkServer:
    """A process that has imported `preload`, from which programs are forked.

    env: of the server while it imports; what libraries read then (OMP_NUM_THREADS, DS_ACCELERATOR) belongs here.
    room: bytes that command lines of programs may take.  log: what the imports print.
    """

    _open = 0  # servers of this process

    def __init__(self, preload: Sequence[str], env: Mapping[str, str], log: Path, room: int = 1024) -> None:
        self._command = [sys.executable, "-m", "jobs.launchers.fork_server", *preload, "." * room]
        self._env, self._log = env, log
        ForkServer._open += 1
        _adopt_orphans(True)
        self._launch()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with self._log.open("ab") as out, ours, theirs:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdin=theirs.fileno(), stdout=out, stderr=out, process_group=0
            )
            self._channel = ours.makefile("rw")

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path | None = None) -> Forked:
        """Start `python -m MODULE ...` or `python FILE ...` with its own environment, log, and process group.

        cwd: its folder, else this process's.  Waits until the imports are done; a server that was killed is replaced.
        Raises OSError when nothing can be forked.
        """
        folder = str(cwd or Path.cwd())
        order = json.dumps({"command": list(command), "env": dict(env), "log": str(log.absolute()), "cwd": folder})
        answer = self._ask(order)
        if not answer:
            self._end()
            self._launch()
            answer = self._ask(order)
        if "pid" not in answer:
            raise OSError(answer.get("error", f"ranks cannot be forked: see {self._log} (out of memory?)"))
        return Forked(answer["pid"])

    def _ask(self, order: str) -> dict[str, Any]:
        """The server's answer; empty when it has gone."""
        try:
            self._channel.write(order + "\n")
            self._channel.flush()
            answer: dict[str, Any] = json.loads(self._channel.readline() or "{}")
        except (BrokenPipeError, ConnectionResetError, json.JSONDecodeError):  # it may have died in mid-answer
            return {}
        return answer

    def close(self) -> None:
        """End the server, not what it has started."""
        self._end()
        ForkServer._open -= 1
        _adopt_orphans(ForkServer._open > 0)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it was not told any more
            self._channel.close()


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


# ---- the server's own process


def main(arguments: list[str]) -> int:
    """Import, then fork a program for each line of standard input; its end is the server's."""
    *preload, _ = arguments
    for name in preload:
        with suppress(ImportError):  # a program that needs it says so in its own log
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections of a program leave what it shares with the others alone
    channel = socket.socket(fileno=os.dup(0)).makefile("rw")
    while line := channel.readline():
        program = json.loads(line)
        try:
            pid = _fork_orphan(program["log"])
        except OSError as error:
            answer: dict[str, Any] = {"error": str(error)}
        else:
            if pid == 0:
                channel.close()
                _become(program["command"], program["env"], program["cwd"])
                return 0
            answer = {"pid": pid}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
    return 0


def _fork_orphan(log: str) -> int:
    """Fork a process that belongs to the server's keeper; its number, 0 in that process itself."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        between = os.getpid()
        try:
            if pid := os.fork():
                with suppress(OSError):
                    os.setpgid(pid, pid)  # here as well, so that it is done before anybody knows of the process
                os.write(writer, str(pid).encode())
                os._exit(0)
            os.close(reader)
            os.close(writer)
            os.setpgid(0, 0)
            _redirect(log)
        except OSError:
            os._exit(1)
        while os.getppid() == between:  # until it is its keeper's
            time.sleep(0.001)
        return 0
    os.close(writer)
    with open(reader, "rb") as answer:
        told = answer.read()
    os.waitpid(between, 0)
    if not told:
        raise OSError("the system lets no further process be started")
    return int(told)


def _redirect(log: str) -> None:
    """Standard input from nowhere, standard output and error to the end of a file."""
    nowhere, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number, source in enumerate((nowhere, out, out)):
        os.dup2(source, number)
    os.close(nowhere)
    os.close(out)


def _become(command: list[str], env: dict[str, str], cwd: str) -> None:
    """Run a program in this process as if Python had been started with it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    atexit.register(gc.unfreeze)  # or packages would find at the end that their objects are still there, and say so
    if _cuda_begun():
        print("the CUDA driver was loaded by an import: this rank imports for itself", flush=True)
        os.execvpe(command[0], command, env)
    _show(command)
    _, *words = command
    if not sys.flags.safe_path:  # Python looks first where it was started, or where the program lies
        sys.path[0] = cwd if words[0] == "-m" else str(Path(words[0]).parent.absolute())
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _cuda_begun() -> bool:
    """Whether the CUDA driver is in this process: what has been forked from such a one can use no GPU."""
    return "/libcuda.so" in Path("/proc/self/maps").read_text()


def _show(command: list[str]) -> None:
    """Let ps and jobs.process see this command line, each word ended by a zero byte as exec leaves them.

    It is written over the server's own, whose last word is there to make room; a longer one is cut.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    words = b"".join(os.fsencode(word) + b"\0" for word in command)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, words, len(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
