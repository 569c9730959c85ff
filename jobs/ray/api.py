"""The API server of a kube context: how it is found and asked, and what its refusals mean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from jobs.errors import NotReady, UserError, nearest, redact

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException, Configuration, CoreV1Api, CustomObjectsApi

CONNECT_S, ANSWER_S = 5.0, 15.0
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # of the pod that this runs in
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST = 400


class KubeError(NotReady):
    """The API server refused or did not answer; the message holds its own words."""

    def __init__(self, message: str, status: int = 0, reason: str = "", words: str = "") -> None:
        super().__init__(message)
        self.status = status  # of HTTP; 0 = there was no answer
        self.reason = reason  # NotFound, AlreadyExists ...; "" where no such API is served
        self.words = words


class Api:
    """Requests to the API server of a context, or of the pod this runs in; "" = what the kube config says."""

    def __init__(self, namespace: str = "", context: str = "") -> None:
        self._namespace, self._context = namespace, context

    @property
    def context(self) -> str:
        """Its name in the kube config; "" in a pod."""
        return self._context or kube_config()[1]

    @cached_property
    def namespace(self) -> str:
        """Where requests are about.  Raises UserError, NotReady where there is no kube config to say it."""
        return self._namespace or self._found[1]

    @cached_property
    def server(self) -> str:
        """Address of the API server.  Raises UserError, NotReady."""
        return str(self._found[0].host)

    @cached_property
    def client(self) -> ApiClient:
        """What groups of calls are made with.  Raises UserError, NotReady."""
        from kubernetes.client import ApiClient

        return ApiClient(self._found[0])

    @cached_property
    def core(self) -> CoreV1Api:
        """Calls about pods, events and namespaces."""
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self.client)

    @cached_property
    def custom(self) -> CustomObjectsApi:
        """Calls about any kind that belongs to a group."""
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi(self.client)

    def ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the server answers to a call of the client library, as plain JSON.  Raises KubeError."""
        return json.loads(self.fetch(call, *arguments, **options))

    def fetch(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
        """The same as bytes.  Raises KubeError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        limits = (CONNECT_S, ANSWER_S)
        try:
            return bytes(call(*arguments, **options, _preload_content=False, _request_timeout=limits).data)
        except ApiException as error:
            raise self._refusal(error) from None
        except HTTPError as error:
            raise KubeError(f"the API server {self.server} cannot be reached: {line(str(error))}: is the cluster up, "
                            "and the context right (kubectl config current-context)?") from None  # fmt: skip

    @cached_property
    def _found(self) -> tuple[Configuration, str]:
        from kubernetes import config
        from kubernetes.client import Configuration

        contexts, _ = kube_config()
        name, found = self.context, Configuration()
        if name and name not in contexts:
            known = ", ".join(sorted(contexts)) or "none"
            raise UserError(f"kubernetes.context: there is no context {name!r} in {_places()}{nearest(name, contexts)} "
                            f"(there is: {known})")  # fmt: skip
        try:
            if name:
                config.load_kube_config(_places(), name, found)  # type: ignore[no-untyped-call]
                namespace = contexts[name].get("namespace") or "default"
            else:
                config.load_incluster_config(found)  # type: ignore[no-untyped-call]
                namespace = (ACCOUNT / "namespace").read_text().strip()
        except (config.ConfigException, OSError, ValueError, KeyError) as error:
            raise NotReady(f"there is no Kubernetes to ask: {line(str(error))}. Choose a context (kubectl config "
                           f"use-context NAME); {_places()} is what was looked at") from None  # fmt: skip
        found.retries = False  # who follows a run asks again soon enough
        if urlsplit(found.host).hostname in LOOPBACK:
            found.proxy = None  # as kubectl does
        return found, namespace

    def _refusal(self, error: ApiException) -> KubeError:
        said = _said(error.body)
        status, reason, words = error.status or 0, said.get("reason", ""), line(_causes(said) or str(error.reason))
        server = f"the API server {self.server}"
        if not status:
            text = f"{server} and this machine do not trust each other: {words}: renew the kube config's certificates"
        elif status == 401:
            text = (f"{server} does not accept this account's credentials ({words}): they may have expired; log in "
                    "again, or renew the kube config")  # fmt: skip
        elif status == 403 and "exceeded quota" in words:
            text = f"a quota does not allow it: {words}: wait for other jobs to end, or ask for more"
        elif status == 403:
            text = f"this account may not do that: {words}: ask for the role of k8s/base"
        elif status == 404 and said.get("details", {}).get("kind") == "namespaces":
            text = f"{words}: create it, or name another one in the cluster file (kubernetes.namespace)"
        elif status == 429 or status >= 500:
            text = f"{server} is busy or ill ({status}: {words}): try again later"
        else:
            text = f"{server} refuses: {words}"
        return KubeError(text, status, reason, words)


def kube_config() -> tuple[dict[str, dict[str, Any]], str]:
    """Contexts by name, and the name of the current one, from the files that kubectl would read.  Raises NotReady."""
    contexts: dict[str, dict[str, Any]] = {}
    current = ""
    for path in filter(None, _places().split(os.pathsep)):
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text()) or {}
            found = {entry["name"]: entry["context"] for entry in content.get("contexts") or ()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise NotReady(f"{path} is no kube config: {line(str(error))}") from None
        contexts = {**found, **contexts}
        current = current or content.get("current-context") or ""
    return contexts, current


def reachable() -> bool:
    """Whether there is a current context, or the account of a pod; nothing is asked over the network."""
    try:
        current = kube_config()[1]
    except NotReady:
        current = ""
    return bool(current) or ("KUBERNETES_SERVICE_HOST" in os.environ and (ACCOUNT / "token").exists())


def line(text: str, longest: int = LONGEST) -> str:
    """In one line and without credentials; of a longer text its beginning and its end."""
    text = " ".join(redact(text).split())
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[5 - longest // 2 :]}"


def _places() -> str:
    return os.environ.get("KUBECONFIG") or "~/.kube/config"


def _said(body: str | None) -> dict[str, Any]:
    """The Status object in an answer, which a server that serves no such API at all does not send."""
    try:
        found = json.loads(body or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("kind") == "Status" else {}


def _causes(said: dict[str, Any]) -> str:
    """Field and message of each mistake, where the server names them; else its message."""
    causes = (said.get("details") or {}).get("causes") or ()
    if said.get("reason") != "Invalid" or not causes:
        return str(said.get("message", ""))
    return "; ".join(f"{cause.get('field', '?')}: {cause.get('message', '')}" for cause in causes)
