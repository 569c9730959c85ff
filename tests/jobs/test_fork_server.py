"""Programs that are forked instead of started: they must not be told apart from started ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import process
from jobs.launchers.fork_server import Forked, ForkServer
from jobs.launchers.local import PRELOAD
from jobs.launchers.ranks import common_environment
from jobs.placement import Placement
from jobs.spec import REPOSITORY

LIMIT_S = 30.0
Start = Callable[..., Forked]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    with closing(ForkServer(["decimal"], environment(), tmp_path / "imports.log")) as server:
        yield server


@pytest.fixture
def start(server: ForkServer, tmp_path: Path) -> Start:
    """Starts a script with some words and environment; its log is `log` in the test's folder."""

    def start(text: str, *words: str, **env: str) -> Forked:
        (tmp_path / "script.py").write_text(textwrap.dedent(text))
        command = [sys.executable, str(tmp_path / "script.py"), *words]
        return server.start(command, environment(**env), tmp_path / "log")

    return start


def until(condition: Callable[[], Any]) -> Any:
    limit = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return value


def said(log: Path) -> str:
    """What a program has written so far; it makes its log itself."""
    return log.read_text() if log.exists() else ""


def test_a_program_has_its_own_words_environment_log_and_group_and_what_the_server_has_imported(
    start: Start, tmp_path: Path
) -> None:
    child = start(
        """
        import json, os, sys
        here = "decimal" in sys.modules
        print(json.dumps([sys.argv[1:], __name__, here, dict(os.environ), sys.stdin.read(), os.getpgid(0)]))
        """,
        "one", "--two=a b", ONLY="here",
    )  # fmt: skip
    assert child.reap() == 0
    words, name, here, env, given, group = json.loads((tmp_path / "log").read_text())
    assert (words, name, here, given, group) == (["one", "--two=a b"], "__main__", True, "", child.pid)
    assert env.items() >= {"ONLY": "here"}.items()
    assert "ONLY" not in os.environ


@pytest.mark.parametrize(
    ("deed", "code"),
    [("pass", 0), ("sys.exit(75)", 75), ("os._exit(3)", 3), ("raise ValueError('broken')", 1),
     ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6), ("sys.exit('words')", 1), ("import nowhere", 1)],
)  # fmt: skip
def test_exit_codes_are_those_of_a_started_program(start: Start, tmp_path: Path, deed: str, code: int) -> None:
    assert start(f"import os, sys\n{deed}").reap() == code
    words = (tmp_path / "log").read_text()
    assert ("Traceback" in words) == (deed.startswith(("raise", "import"))), words
    assert subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True).returncode == code


def test_what_is_registered_for_the_exit_runs(start: Start, tmp_path: Path) -> None:
    assert start("import atexit\natexit.register(print, 'left')").reap() == 0
    assert (tmp_path / "log").read_text() == "left\n"


def test_a_module_is_run_and_found_by_its_command_line(server: ForkServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.jobs.fake_worker", "wait", "--run", "demo-0123456789", "--store",
               f"file://{tmp_path}/a store", "--attempt", "1"]  # fmt: skip
    child = server.start(command, environment(RANK="1"), tmp_path / "log")
    until(lambda: "ready" in said(tmp_path / "log"))
    [found] = process.running("tests.jobs.fake_worker", "--run", "demo-0123456789")
    assert found.pid == child.pid
    assert process.argument(found, "--store") == f"file://{tmp_path}/a store"
    assert found.ppid() == os.getpid(), "it is this process's child, not the server's"
    child.signal(signal.SIGUSR2)
    assert child.reap() == 75
    assert "asked by SIGUSR2" in (tmp_path / "log").read_text()
    child.signal(signal.SIGKILL)  # reaches nobody any more


def test_a_server_that_is_killed_touches_no_program_and_is_replaced(
    server: ForkServer, start: Start, tmp_path: Path
) -> None:
    first = start("import time\nprint('on', flush=True)\ntime.sleep(60)")
    until(lambda: "on" in said(tmp_path / "log"))  # it has read its script, which the second one replaces
    serving = server._process
    serving.kill()
    serving.wait(LIMIT_S)
    second = start("print('second')")
    assert second.reap() == 0
    assert "second" in (tmp_path / "log").read_text()
    assert psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE
    first.kill()
    assert first.reap() == -9


def test_the_end_of_one_server_leaves_the_programs_of_another_to_their_keeper(
    server: ForkServer, start: Start, tmp_path: Path
) -> None:
    ForkServer([], environment(), tmp_path / "other.log").close()
    assert start("raise SystemExit(7)").reap() == 7


def test_killing_ends_what_a_program_has_started(start: Start, tmp_path: Path) -> None:
    child = start("import subprocess, time\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)")
    grandchild = int(until(lambda: said(tmp_path / "log").strip()))
    threading.Timer(0.1, child.kill).start()
    assert child.reap() == -9
    until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE)


def test_a_log_that_cannot_be_written_is_an_error_of_this_program_alone(server: ForkServer, start: Start) -> None:
    child = server.start([sys.executable, "-c"], environment(), Path("/nowhere/log"))
    assert child.reap() == 1
    assert start("print('well')").reap() == 0


def test_programs_and_server_end_with_their_keeper(tmp_path: Path) -> None:
    keeper = tmp_path / "keeper.py"
    keeper.write_text(textwrap.dedent(
        f"""
        import os, sys, time
        from pathlib import Path
        from jobs.launchers.fork_server import ForkServer
        server = ForkServer([], dict(os.environ), Path("{tmp_path}/imports.log"))
        child = server.start([sys.executable, "{tmp_path}/child.py"], dict(os.environ), Path("{tmp_path}/log"))
        print(server._process.pid, child.pid, flush=True)
        time.sleep(60)
        """
    ))  # fmt: skip
    (tmp_path / "child.py").write_text(
        "import time\nfrom jobs.process import die_with_parent\ndie_with_parent()\n"
        "print('on', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, keeper], env=environment(), stdout=subprocess.PIPE, text=True) as process_:
        assert process_.stdout is not None
        both = [psutil.Process(int(word)) for word in process_.stdout.readline().split()]
        until(lambda: "on" in said(tmp_path / "log"))
        process_.kill()
    gone, left = psutil.wait_procs(both, LIMIT_S)
    assert not left, f"{left} outlive the process that had them started"


def test_where_an_import_has_loaded_the_cuda_driver_a_rank_imports_for_itself(tmp_path: Path) -> None:
    """Its programs are started, with the same words, environment and parent."""
    (tmp_path / "loads_it.py").write_text(
        "import mmap\nfile = open('libcuda.so.1', 'wb+')\nfile.write(b'x' * 4096)\nfile.flush()\n"
        "kept = mmap.mmap(file.fileno(), 4096)\n"
    )
    env = environment(PYTHONPATH=f"{REPOSITORY}:{tmp_path}")
    (tmp_path / "script.py").write_text("import os, sys\nprint('loads_it' in sys.modules, sys.argv[1:], os.getppid())")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        with closing(ForkServer(["loads_it"], env, tmp_path / "imports.log")) as server:
            child = server.start([sys.executable, str(tmp_path / "script.py"), "word"], env, tmp_path / "log")
            assert child.reap() == 0
    finally:
        os.chdir(here)
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == "the CUDA driver was loaded by an import: this rank imports for itself"
    assert second == f"False ['word'] {os.getpid()}"


def test_importing_what_ranks_of_gpus_need_asks_nothing_of_cuda_and_leaves_one_thread(tmp_path: Path) -> None:
    """What was touched before the fork would be lost to the ranks, on a machine with GPUs."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(
        f"""
        import importlib, os, sys
        import torch
        asked = []
        def watch(name):
            real = getattr(torch._C, name, None)
            def told(*words):
                asked.append(name)
                return real(*words) if real else 0
            setattr(torch._C, name, told)
        for name in ("_cuda_getDeviceCount", "_cuda_init", "_cuda_getDevice", "_cuda_setDevice"):
            watch(name)
        for name in {PRELOAD!r}:
            importlib.import_module(name)
        assert not torch.cuda.is_initialized()
        print(asked, "deepspeed" in sys.modules, len(os.listdir("/proc/self/task")))
        """
    ))  # fmt: skip
    env = common_environment(Placement(2, "cuda", 1))
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[] True 1"], done.stdout + done.stderr
