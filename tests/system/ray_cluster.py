"""A Ray cluster of our own on this machine: a head and further nodes, each with an address and one CPU of its own."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from tests.cli import wait_for

RAY = Path(sys.executable).with_name("ray")


class RayCluster:
    """Asks its clients for a token. Nodes can be killed and started; `env` is what a client needs."""

    def __init__(self, folder: Path, **env: str) -> None:
        """folder: short, as it holds sockets.  env: of all nodes, and so of the ranks."""
        self.folder, self.port, self.dashboard = folder, _free_port(), _free_port()
        self.token = secrets.token_hex(16)
        search = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_worker_niceness": "0",
                "RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}  # fmt: skip
        self._env = {**os.environ, **env, **auth, "PATH": search, "RAY_USAGE_STATS_ENABLED": "0"}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def env(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, node: int) -> None:
        """Node 1 is the head. Two nodes on loopback, so that they count as two machines."""
        own = [f"--node-ip-address=127.0.0.{node + 1}", "--num-cpus=1", "--block", "--disable-usage-stats",
               f"--temp-dir={self.folder}/n{node}"]  # fmt: skip
        head = ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}",
                f"--ray-client-server-port={_free_port()}"]  # fmt: skip
        role = head if node == 1 else [f"--address=127.0.0.2:{self.port}"]
        env = {name: value for name, value in self._env.items() if name != "RAY_ADDRESS"}
        with (self.folder / f"node-{node}.log").open("ab") as log:
            self._nodes[node] = subprocess.Popen([RAY, "start", *role, *own], env=env, stdout=log, stderr=log)
        wait_for(f"node {node} of the Ray cluster", lambda: self._answers(node), 90)

    def mend(self) -> None:
        """Start the nodes that are not there."""
        for node in (1, 2):
            if node in self._nodes and self._nodes[node].poll() is not None:
                self.kill(node)
            if node not in self._nodes:
                self.start(node)

    def kill(self, node: int) -> None:
        """All at once, as when a machine loses its power."""
        process = self._nodes.pop(node)
        with suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid)
            for each in [*tree.children(recursive=True), tree]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()

    def raylet(self, node: int) -> psutil.Process:
        return next(p for p in psutil.Process(self._nodes[node].pid).children() if p.name() == "raylet")

    def alive(self) -> int:
        """Nodes that the head believes in."""
        return sum(
            node["raylet"].get("state") == "ALIVE" for node in self.ask("/nodes?view=summary")["data"]["summary"]
        )

    def ask(self, path: str) -> Any:
        """The dashboard's answer."""
        asked = Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with build_opener(ProxyHandler({})).open(asked, timeout=5) as answer:
            return json.load(answer)

    def stop(self) -> None:
        for node in sorted(self._nodes, reverse=True):
            self.kill(node)

    def _answers(self, node: int) -> bool:
        assert self._nodes[node].poll() is None, (self.folder / f"node-{node}.log").read_text()
        with suppress(Exception):
            return self.alive() == len(self._nodes)
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
