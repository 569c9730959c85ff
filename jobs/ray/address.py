"""Runs on a Ray cluster that is there already, through Ray's own job submission."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from core import machine
from jobs.cluster import Cluster
from jobs.errors import NotReady, UserError, redact
from jobs.launchers import Elsewhere, Launcher, Look, Looks, Order, tries
from jobs.placement import Placement, allowed_ranks, demand, fits, gathered
from jobs.ray import command
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from core.recipe import Recipe
    from jobs.record import Run

STOP_S = 30  # that workers without a record have to leave
CONNECT_S, ANSWER_S = 5.0, 30.0
AGENT_S = 60.0  # for which a cluster that has just started may refuse jobs
NAMES = ("core", "jobs")  # of the code that goes along
SHARED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION")  # no secret is among them
ENDED = {"SUCCEEDED": "has ended", "FAILED": "FAILED", "STOPPED": "was stopped"}


class OnCluster(Launcher):
    """A job of a running Ray cluster: its entry point sees to attempts, Ray Train starts the ranks."""

    name = "ray"
    shares_tree = False
    queues = True

    def __init__(self, address: str, cluster: Cluster) -> None:
        self.address, self.cluster = address, cluster
        self._client: JobSubmissionClient | NotReady | None = None
        self._looks = Looks()

    @property
    def client(self) -> JobSubmissionClient:
        """Raises NotReady when nobody answers at the address."""
        if isinstance(self._client, NotReady):
            raise self._client
        self._client = self._client or self._connect()
        return self._client

    def _connect(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        class Limited(JobSubmissionClient):
            """Ray's own waits for an answer for ever."""

            def _do_request(self, *arguments: Any, **options: Any) -> Any:
                return super()._do_request(*arguments, **{"timeout": (CONNECT_S, ANSWER_S), **options})

        try:
            with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would ask these instead of the address
                return Limited(self.address)
        except _errors(ValueError, KeyError, TypeError) as error:  # or something else answers there
            self._client = NotReady(
                f"RAY_ADDRESS: no Ray cluster answers at {self.address}: {_told(error)}; it is the address of the "
                "dashboard, for example RAY_ADDRESS=http://127.0.0.1:8265"
            )
            raise self._client from None

    @cached_property
    def session(self) -> str:
        """Which Ray cluster it is that answers here: another one may, later.  Raises NotReady."""
        try:
            return str(self.client._do_request("GET", "/api/version").json()["session_name"])
        except _errors(ValueError, KeyError) as error:
            raise NotReady(f"the Ray cluster at {self.address} does not say which it is: {_told(error)}") from None

    @cached_property
    def nodes(self) -> list[dict[str, float]]:
        """What each living node has."""
        from ray.util.state import list_nodes

        try:
            # Nodes that have died count as an answer that was cut short.
            found = list_nodes(self.client.get_address(), filters=[("state", "=", "ALIVE")], limit=10_000,
                               raise_on_missing_output=False)  # fmt: skip
        except Exception as error:  # of many kinds, all of them a cluster that does not answer as it should
            raise NotReady(f"the Ray cluster at {self.address} does not tell its nodes: {_told(error)}") from None
        return [node.resources_total or {} for node in found]

    def gpus(self) -> int:
        return int(sum(node.get("GPU", 0) for node in self.nodes))

    def place(self, recipe: Recipe) -> Placement:
        return gathered(recipe, self.nodes, self.cluster.cpus_per_task)

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        self.cluster.require_shared(root)
        each = demand(placement.device, self.cluster.cpus_per_task)
        room = sum(fits(node, each) for node in self.nodes)
        wanted = recipe.launch.min_ranks or placement.ranks
        if room < min(n for n in allowed_ranks(recipe) if n >= min(wanted, placement.ranks)):
            raise UserError(
                f"launch.ranks: {wanted} ranks of {command.told(each)} are wanted; the Ray cluster at {self.address} "
                f"has room for {room}: add nodes, or set launch.ranks or the cluster file's cpus_per_task lower"
            )

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        return [self._submit(order, placement) for order in orders]

    def _submit(self, order: Order, placement: Placement) -> bool:
        at, job = self.address, f"{command.tagged(order.run.id, order.run.root)}-{order.attempt}"
        info = {**order.info, **asdict(placement), "launcher": self.name, "job": job, "at": at, "session": self.session}
        return tries.submit(order, info, lambda: self._start(job, order, placement, at))

    def _start(self, job: str, order: Order, placement: Placement, at: str) -> None:
        python, after = self.cluster.python or "python", ",".join(order.after)
        line = command.line(python, order.run.id, order.run.root, job, at, placement, self.cluster.cpus_per_task, after)
        self._give(job, line, round(order.recipe.launch.grace_s) + 60, order.recipe)

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        job = f"{recipe.name}-workers-{uuid.uuid4().hex[:6]}"
        each = demand(placement.device, self.cluster.cpus_per_task)
        line = command.workers(self.cluster.python or "python", arguments, count, each, placement.threads)
        self._give(job, line, STOP_S, recipe)
        return (
            f"Ray job {job}: {count} workers of {command.told(each)}; ray job logs --follow {job} shows what they say, "
            f"ray job stop {job} ends them (with RAY_ADDRESS={self.address})"
        )

    def _give(self, job: str, line: str, grace_s: int, recipe: Recipe) -> None:
        """A job whose entry point is one line of shell.  grace_s: from being asked to stop.  Raises NotReady."""
        variables = {
            name: os.environ[name] for name in SHARED if os.environ.get(name) and not _is_here(os.environ[name])
        }
        variables |= {**self.cluster.network(), **self.cluster.env, **machine.named(recipe)}
        variables["RAY_JOB_STOP_WAIT_TIME_S"] = str(grace_s)
        others = [f"/{path.name}" for path in REPOSITORY.iterdir() if path.name not in NAMES]
        code = {"working_dir": str(REPOSITORY), "excludes": [*others, "__pycache__"], "env_vars": variables}
        limit = time.monotonic() + AGENT_S
        while True:
            try:
                with _quiet():
                    self.client.submit_job(entrypoint=line, submission_id=job, runtime_env=code)
                return
            except _errors() as error:
                if "No available agent" not in str(error) or time.monotonic() > limit:
                    raise NotReady(f"the Ray cluster at {self.address} takes no job: {_told(error)}") from None
                time.sleep(1.0)

    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ask the job to end: its ranks read in the record that the run is cancelled, save and leave."""
        if at_once:
            return False  # Ray has been told how long it may take, and ends it then
        try:
            job = _job(run, info)  # before anybody is asked
            return bool(self.client.stop_job(job))
        except _errors(NotReady):
            return False

    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        return self._looks.at(str(info.get("job")), lambda: self._look(run, info))

    def _look(self, run: Run, info: Mapping[str, Any]) -> Look:
        try:
            job = _job(run, info)
            if info.get("session") not in (None, self.session):
                return Look(None, f"another Ray cluster than that of job {job} answers at {self.address} now")
            found = self.client.get_job_info(job)
        except NotReady as error:
            return Look(None, str(error))
        except _errors() as error:
            gone = "status code 404" in str(error)
            unknown = f"the Ray cluster at {self.address} knows no job {job}"
            return Look(False, unknown) if gone else Look(None, _told(error))
        state = getattr(found.status, "value", str(found.status))
        if state in ENDED:
            said = [line for line in (found.message or "").splitlines() if line.startswith("error: ")]
            return Look(False, "\n".join([f"Ray job {job} {ENDED[state]}", *(redact(line) for line in said)]))
        return Look(True, f"Ray job {job} is {state} at {self.address}")

    def logs(self, run: Run, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        """What the entry point said, over all attempts; the ranks' own words are in the store."""
        try:
            job = _job(run, info)
            return {"entry.log": redact(self.client.get_job_logs(job)).encode()}
        except _errors(NotReady):
            return {}


def _job(run: Run, info: Mapping[str, Any]) -> str:
    """Of a run's record.  Raises Elsewhere: a job of this name would be another run's."""
    job, own = str(info.get("job", "")), command.tagged(run.id, run.root)
    if not re.fullmatch(rf"{re.escape(own)}-\d{{1,9}}", job, re.ASCII):
        raise Elsewhere(f"its record names a Ray job {job!r}, which is none of run {run.id}'s: nobody was asked")
    return job


def _is_here(value: str) -> bool:
    """An address of this machine alone, such as a forwarded port: nodes have their own."""
    return urlsplit(value).hostname in ("localhost", "127.0.0.1", "::1")


def _errors(*further: type[Exception]) -> tuple[type[Exception], ...]:
    """What Ray's client raises when a cluster does not answer, or refuses."""
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    return RuntimeError, ConnectionError, AuthenticationError, RequestException, *further


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without these variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's lines on each file that does not go along."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _told(error: BaseException) -> str:
    """An error of Ray's in one line."""
    if type(error).__name__ == "AuthenticationError":
        return f"{str(error).splitlines()[0]}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
