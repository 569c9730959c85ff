"""RayJobs on a Kubernetes cluster: made, watched and taken away through its API server."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from jobs.errors import JobError, NotReady
from jobs.launchers import Look, Looks
from jobs.ray import events
from jobs.ray.api import Api, KubeError
from jobs.ray.events import Obj, Seen

ENDING_S = 4.0  # beyond a pod's time, in which it may still be shown
LOG_LINES = 20_000  # of a pod, the newest; what ranks say is in the store
SHOWN_PODS = 3  # whose events are asked for
KUEUE = ("v1beta2", "v1beta1")  # of which a cluster serves one or both
PLURALS = {"RayJob": "rayjobs", "PodDisruptionBudget": "poddisruptionbudgets"}
NEEDED = (("create", "ray.io", "rayjobs"), ("get", "ray.io", "rayjobs"), ("delete", "ray.io", "rayjobs"),
          ("list", "", "pods"), ("list", "", "events"), ("create", "policy", "poddisruptionbudgets"))  # fmt: skip


class Kube:
    """RayJobs of one namespace, through the API server of a kube context; "" = what the kube config says."""

    def __init__(self, namespace: str = "", context: str = "") -> None:
        self._api = Api(namespace, context)
        self._looks = Looks()

    @property
    def context(self) -> str:
        """Of the kube config; "" in a pod."""
        return self._api.context

    @property
    def namespace(self) -> str:
        """Raises UserError, NotReady where there is no kube config to say it."""
        return self._api.namespace

    def check(self) -> None:
        """The cluster knows RayJobs, and this account may have some.  Raises NotReady."""
        found = self._rayjobs(self._api.custom.get_api_resources, "ray.io", "v1")
        if "rayjobs" not in [resource["name"] for resource in found["resources"]]:
            raise self._no_kuberay()
        try:
            self._api.ask(self._api.core.read_namespace, self.namespace)
        except KubeError as error:
            if error.status != 403:  # few may read namespaces
                raise
        lacking = [f"{verb} {resource}" for verb, group, resource in NEEDED if not self._may(verb, group, resource)]
        if lacking:
            raise NotReady(f"this account may not {', '.join(lacking)} in namespace {self.namespace}: ask for the role "
                           "of k8s/base, or name another in the cluster file (kubernetes.namespace)")  # fmt: skip

    def create(self, documents: list[Obj]) -> None:
        """Make a RayJob, the first document, and what goes when it goes.  Raises KubeError, and then leaves nothing."""
        job, *others = documents
        name = job["metadata"]["name"]
        try:
            made = self._rayjobs(self._create, job)
        except KubeError as error:
            if error.status == 0 or error.status >= 500:  # it may have been made all the same
                self._undo(name)
            if error.reason != "AlreadyExists":
                raise
            raise KubeError(f"RayJob {name} is in namespace {self.namespace} already ({error.words}): somebody else "
                            "has submitted the run, or it is left over and kubectl delete rayjob takes it away",
                            error.status, error.reason, error.words) from None  # fmt: skip
        owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": name, "uid": made["metadata"]["uid"]}
        try:
            for document in others:
                owned = {**document, "metadata": {**document["metadata"], "ownerReferences": [owner]}}
                self._api.ask(self._create, owned)
        except BaseException:
            self._undo(name)
            raise

    def delete(self, name: str) -> bool:
        """Take a RayJob away, and its pods with it; they have their time to save.  Raises KubeError."""
        try:
            self._rayjobs(self._api.custom.delete_namespaced_custom_object, *self._one(name),
                          propagation_policy="Background")  # fmt: skip
        except KubeError as error:
            if error.reason != "NotFound":
                raise
            return False
        self._looks.forget()
        return True

    def working(self, name: str) -> bool:
        """Whether the entry point has started and not ended.  Raises KubeError."""
        job = self._job(name) or {}
        status = job.get("status") or {}
        return status.get("jobDeploymentStatus") == "Running" and status.get("jobStatus") == "RUNNING"

    def look(self, name: str) -> Look:
        """Whether the RayJob waits or works, and for what or why not, in one line."""

        def ask() -> Look:
            try:
                return self._look(name)
            except JobError as error:
                return Look(None, f"RayJob {name}: {error}")

        return self._looks.at(name, ask)

    def logs(self, name: str) -> dict[str, bytes]:
        """What the pods of a RayJob have said, by the name of a file; without what cannot be read."""
        found: dict[str, bytes] = {}
        try:
            pods = self._pods(name, self._job(name))
        except JobError:
            return found
        for pod in sorted(pods, key=events.made, reverse=True):
            own, container = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]
            role = pod["metadata"].get("labels", {}).get(events.ROLE, "submitter")
            file = f"{role}.log"
            if role == "worker" or file in found:
                file = f"{role}-{own.rpartition('-')[2]}.log"
            with suppress(KubeError):
                found[file] = self._api.fetch(self._api.core.read_namespaced_pod_log, own, self.namespace,
                                              container=container, tail_lines=LOG_LINES)  # fmt: skip
        return found

    def _undo(self, name: str) -> None:
        with suppress(KubeError):
            self.delete(name)

    def _look(self, name: str) -> Look:
        job = self._job(name)
        if job:
            return events.tell(self._see(job), time.time())
        where = f"RayJob {name} is not in namespace {self.namespace} any more"
        with suppress(KubeError):  # who may not see pods believes that they are gone
            left = [pod for pod in self._pods(name, None) if _ends(pod, time.time())]
            if left:
                return Look(True, f"{where}: {len(left)} of its pods are still ending")
        return Look(False, where)

    def _see(self, job: Obj) -> Seen:
        """A RayJob and all that could explain its state."""
        meta, unread = job["metadata"], []

        def read(what: str, call: Callable[..., list[Obj]], *arguments: Any) -> list[Obj]:
            try:
                return call(*arguments)
            except KubeError as error:
                if error.status != 403:
                    raise
                unread.append(f"{what} cannot be read: {error.words}")
                return []

        pods = read("pods", self._pods, meta["name"], job)
        if events.well(job, pods):
            return Seen(job, pods, unread=unread)
        queued = job["spec"].get("suspend") and events.QUEUE in meta.get("labels", {})
        workloads = read("workloads", self._workloads, meta["uid"]) if queued else []
        about = [meta["name"], (job.get("status") or {}).get("rayClusterName"),
                 *(thing["metadata"]["name"] for thing in workloads),
                 *[pod["metadata"]["name"] for pod in pods if events.troubled(pod)][:SHOWN_PODS]]  # fmt: skip
        said = read("events", self._events, list(filter(None, about)))
        return Seen(job, pods, said, next(iter(workloads), None), unread)

    def _job(self, name: str) -> Obj | None:
        try:
            found: Obj = self._rayjobs(self._api.custom.get_namespaced_custom_object, *self._one(name))
        except KubeError as error:
            if error.reason == "NotFound":
                return None
            raise
        return found

    def _pods(self, name: str, job: Obj | None) -> list[Obj]:
        """Of the RayJob's cluster and its submitter's; of a RayJob that is gone, those whose names are like its own."""
        cluster = ((job or {}).get("status") or {}).get("rayClusterName", "")
        call = self._api.core.list_namespaced_pod
        found = self._list(call, label_selector=f"job-name={name}")
        if cluster:
            found += self._list(call, label_selector=f"ray.io/cluster={cluster}")
        elif not job:
            own = re.compile(rf"{re.escape(name)}(-raycluster)?-[a-z0-9]{{5}}")
            every = self._list(call, label_selector="ray.io/cluster")
            found += [pod for pod in every if own.fullmatch(pod["metadata"]["labels"]["ray.io/cluster"])]
        return found

    def _workloads(self, uid: str) -> list[Obj]:
        call = self._api.custom.list_namespaced_custom_object
        for version in KUEUE:
            try:
                return self._list(partial(call, "kueue.x-k8s.io", version, plural="workloads"),
                                  label_selector=f"kueue.x-k8s.io/job-uid={uid}")  # fmt: skip
            except KubeError as error:
                if error.status != 404:
                    raise
        return []

    def _events(self, names: list[str]) -> list[Obj]:
        found: list[Obj] = []
        for name in names:
            found += self._list(self._api.core.list_namespaced_event, field_selector=f"involvedObject.name={name}")
        return found

    def _list(self, call: Callable[..., Any], **options: str) -> list[Obj]:
        return list(self._api.ask(call, self.namespace, **options)["items"] or ())

    def _may(self, verb: str, group: str, resource: str) -> bool:
        from kubernetes.client import AuthorizationV1Api

        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
        kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        review = {**kind, "spec": {"resourceAttributes": attributes}}
        answer = self._api.ask(AuthorizationV1Api(self._api.client).create_self_subject_access_review, review)
        return bool(answer["status"]["allowed"])

    def _create(self, document: Obj, **options: Any) -> Any:
        """Strictly: a field that this cluster's KubeRay does not know would be left out without a word."""
        group, _, version = document["apiVersion"].partition("/")
        return self._api.custom.create_namespaced_custom_object(
            group, version, self.namespace, PLURALS[document["kind"]], document, field_validation="Strict", **options
        )

    def _rayjobs(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer to something that only a cluster with KubeRay understands.  Raises KubeError."""
        try:
            return self._api.ask(call, *arguments, **options)
        except KubeError as error:
            if error.status == 404 and not error.reason:
                raise self._no_kuberay() from None
            raise

    def _no_kuberay(self) -> KubeError:
        return KubeError(f"the API server {self._api.server} knows no RayJobs (ray.io/v1): install the KubeRay "
                         "operator (k8s/README.md), or choose another context", 404)  # fmt: skip

    def _one(self, name: str) -> tuple[str, str, str, str, str]:
        return "ray.io", "v1", self.namespace, "rayjobs", name


def _ends(pod: Obj, now: float) -> bool:
    """Works or saves; one on a node that is lost is shown long after its time."""
    over = events.seconds(pod["metadata"].get("deletionTimestamp"))
    return pod["status"].get("phase") not in ("Succeeded", "Failed") and (not over or now < over + ENDING_S)
