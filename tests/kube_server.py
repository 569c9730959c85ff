"""A small API server of Kubernetes: real HTTP, bearer tokens and objects in memory, on which only a test acts."""

from __future__ import annotations

import copy
import json
import ssl
import threading
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

Obj = dict[str, Any]
SERVED = {"ray.io/v1": ["rayjobs", "rayclusters"], "policy/v1": ["poddisruptionbudgets"],
          "kueue.x-k8s.io/v1beta2": ["workloads"], "v1": ["pods", "events", "namespaces"]}  # fmt: skip
PLURALS = {"RayJob": "rayjobs", "PodDisruptionBudget": "poddisruptionbudgets", "Workload": "workloads", "Pod": "pods",
           "Event": "events"}  # fmt: skip
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
HANG_S = 60.0


class Refusal(Exception):  # noqa: N818 - is an answer
    """Ends a request with a Status object, as the API server sends it."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
                     "reason": reason, "details": details, "code": code}  # fmt: skip
        self.code = code


class Target(NamedTuple):
    """What a path is about."""

    group: str  # group/version, or v1
    namespace: str
    plural: str
    name: str
    part: str  # log

    @property
    def kinds(self) -> str:
        """`rayjobs.ray.io`, as messages name them."""
        return ".".join(filter(None, (self.plural, self.group.rpartition("/")[0])))


class KubeServer:
    """`with KubeServer(folder) as server:` listens on loopback, and server.kubeconfig leads to it.

    on_create is called in a thread of its own with a copy of each RayJob that is created: there a test does what an
    operator would, and tells by `change`.
    """

    def __init__(self, folder: Path, namespace: str = "ml", certificate: Path | None = None) -> None:
        self.kubeconfig, self.namespace, self.token = folder / "kubeconfig", namespace, uuid.uuid4().hex
        self.served = copy.deepcopy(SERVED)  # without a group, nothing of it is known here
        self.namespaces = {namespace}
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural)
        self.logs: dict[str, bytes] = {}  # by pod
        self.seen: list[str] = []  # "METHOD /path?query"
        self.on_create: Callable[[Obj], object] | None = None
        self._planned: list[tuple[str, str, int, Obj | None]] = []
        self._stored: dict[tuple[str, str], Obj] = {}  # by plural and name
        self._lock, self.stopped = threading.RLock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Exchange,), {"kube": self}))
        self._http.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"http{'s' * bool(certificate)}://127.0.0.1:{self._http.server_address[1]}"
        self.kubeconfig.write_text(self._config())

    def __enter__(self) -> KubeServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def load(self, things: Iterable[Obj] | Path) -> None:
        """Store objects as they are, or those of a file of answers."""
        found = json.loads(things.read_text())["items"] if isinstance(things, Path) else things
        with self._lock:
            for thing in found:
                self._stored[PLURALS[thing["kind"]], thing["metadata"]["name"]] = copy.deepcopy(thing)

    def objects(self, plural: str) -> list[Obj]:
        """What is stored of a kind."""
        with self._lock:
            return [copy.deepcopy(thing) for (kind, _), thing in self._stored.items() if kind == plural]

    def change(self, plural: str, name: str, patch: Obj) -> Obj:
        """Merge a patch into an object, its status too."""
        with self._lock:
            old = self._stored[plural, name]
            new = self._stored[plural, name] = merged(old, patch)
        return copy.deepcopy(new)

    def remove(self, plural: str, name: str) -> None:
        """Take an object away, and what it owns."""
        with self._lock:
            gone = self._stored.pop((plural, name))["metadata"].get("uid")
            for key, thing in list(self._stored.items()):
                if gone in [owner["uid"] for owner in thing["metadata"].get("ownerReferences", ())]:
                    del self._stored[key]

    def plan(self, method: str, plural: str, status: int, body: Obj | None = None) -> None:
        """From now on answer so; status 0 hangs up, and -1 does not answer at all."""
        self._planned.append((method, plural, status, body))

    def planned(self, method: str, plural: str) -> tuple[int, Obj | None] | None:
        return next((plan[2:] for plan in reversed(self._planned) if plan[:2] == (method, plural)), None)

    def create(self, target: Target, thing: Obj) -> Obj:
        name, space = thing["metadata"]["name"], thing["metadata"].setdefault("namespace", target.namespace)
        if target.namespace not in self.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{target.namespace}" not found', name=space, kind="namespaces")
        if space != target.namespace:
            raise Refusal(400, "BadRequest", "the namespace of the provided object does not match the namespace sent "
                          "on the request")  # fmt: skip
        with self._lock:
            if (target.plural, name) in self._stored:
                group = target.group.partition("/")[0]
                raise Refusal(409, "AlreadyExists", f'{target.kinds} "{name}" already exists', name=name, group=group)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            thing["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
            self._stored[target.plural, name] = thing
        if target.plural == "rayjobs":
            self._tell(thing)
        return thing

    def one(self, target: Target) -> Obj:
        with self._lock:
            found = self._stored.get((target.plural, target.name))
        if not found or found["metadata"]["namespace"] != target.namespace:
            raise Refusal(404, "NotFound", f'{target.kinds} "{target.name}" not found', name=target.name,
                          group=target.group.rpartition("/")[0], kind=target.plural)  # fmt: skip
        return found

    def _tell(self, job: Obj) -> None:
        if self.on_create:
            threading.Thread(target=self.on_create, args=(copy.deepcopy(job),), daemon=True).start()

    def _config(self) -> str:
        context = {"cluster": "toy", "user": "jane", "namespace": self.namespace}
        return json.dumps({  # which is YAML too
            "apiVersion": "v1", "kind": "Config", "current-context": "toy",
            "clusters": [{"name": "toy", "cluster": {"server": self.url}}],
            "users": [{"name": "jane", "user": {"token": self.token}}],
            "contexts": [{"name": "toy", "context": context}],
        })  # fmt: skip


class Exchange(BaseHTTPRequestHandler):
    """One request to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for an acknowledgement of its headers
    kube: KubeServer

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = json.loads(self.rfile.read(length) or "null")
        self.kube.seen.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        try:
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            if (scheme.lower(), token) != ("bearer", self.kube.token):
                raise Refusal(401, "Unauthorized", "Unauthorized")
            self._answer(*self._route(url.path.strip("/").split("/")))
        except Refusal as refusal:
            self._answer(refusal.code, refusal.body)

    do_GET = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815 (names of the standard library)

    def _route(self, parts: list[str]) -> tuple[int, object]:
        group, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if rest == ["selfsubjectaccessreviews"]:
            wanted = self.body["spec"]["resourceAttributes"]
            allowed = (wanted["verb"], wanted["resource"]) not in self.kube.forbidden
            return 201, {**self.body, "status": {"allowed": allowed}}
        served = self.kube.served.get(group)
        if served is None:
            return 404, b"404 page not found\n"
        if not rest:
            resources = [{"name": name, "namespaced": True} for name in served]
            return 200, {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
        space, plural, name, part = (rest[1:] + [""] * 4)[:4]
        if not plural:
            return self._namespace(space)
        return (404, b"404 page not found\n") if plural not in served else self._do(
            Target(group, space, plural, name, part)
        )  # fmt: skip

    def _do(self, target: Target) -> tuple[int, object]:
        kube, verb = self.kube, VERBS[self.command]
        if verb == "get" and not target.name:
            verb = "list"
        if (verb, target.plural) in kube.forbidden:
            raise forbidden(verb, target)
        if plan := kube.planned(self.command, target.plural):
            return plan
        if verb == "create":
            return 201, kube.create(target, self.body)
        if verb == "list":
            return 200, {"kind": "List", "apiVersion": target.group, "metadata": {}, "items": self._listed(target)}
        found = kube.one(target)
        if target.part == "log":
            if target.name not in kube.logs:
                raise Refusal(400, "BadRequest", f'container in pod "{target.name}" is waiting to start')
            return 200, kube.logs[target.name]
        if verb == "patch":
            if self.headers["Content-Type"] != "application/merge-patch+json":
                raise Refusal(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
            return 200, kube.change(target.plural, target.name, self.body)
        if verb == "delete":
            kube.remove(target.plural, target.name)
        return 200, found

    def _namespace(self, space: str) -> tuple[int, object]:
        target = Target("v1", "", "namespaces", space, "")
        if ("get", "namespaces") in self.kube.forbidden:
            raise forbidden("get", target)
        if space not in self.kube.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{space}" not found', name=space, kind="namespaces")
        return 200, {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": space}}

    def _listed(self, target: Target) -> list[Obj]:
        there = [t for t in self.kube.objects(target.plural) if t["metadata"]["namespace"] == target.namespace]
        for term in filter(None, self.query.get("labelSelector", "").split(",")):
            key, equals, value = term.partition("=")
            there = [t for t in there if (label := t["metadata"].get("labels", {}).get(key)) is not None
                     and (not equals or label == value)]  # fmt: skip
        for term in filter(None, self.query.get("fieldSelector", "").split(",")):
            path, _, value = term.partition("=")
            there = [t for t in there if field(t, path) == value]
        return there

    def _answer(self, status: int, body: object) -> None:
        if status <= 0:
            self.close_connection = True
            self.kube.stopped.wait(HANG_S if status else 0.0)
            return
        plain = isinstance(body, bytes)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def forbidden(verb: str, target: Target) -> Refusal:
    group = target.group.rpartition("/")[0]
    about = f'{target.kinds} "{target.name}"' if target.name else target.kinds
    where = f' in the namespace "{target.namespace}"' if target.namespace else ""
    who = f'User "jane" cannot {verb} resource "{target.plural}" in API group "{group}"'
    return Refusal(403, "Forbidden", f"{about} is forbidden: {who}{where}", name=target.name, kind=target.plural)


def field(thing: Obj, path: str) -> str:
    """What a field selector compares, `involvedObject.name`."""
    outer, _, inner = path.partition(".")
    return field(thing.get(outer, {}), inner) if inner else str(thing.get(outer, ""))


def merged(old: Obj, patch: Obj) -> Obj:
    """A JSON merge patch: null takes a field away."""
    new = {**old, **{key: merged(old.get(key) or {}, value) if isinstance(value, dict) else copy.deepcopy(value)
                     for key, value in patch.items()}}  # fmt: skip
    return {key: value for key, value in new.items() if value is not None or key not in patch}
