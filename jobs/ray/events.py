"""Why a RayJob is where it is: one line out of what the API says of it, of its pods, its Workload and their events."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobs.follow import duration
from jobs.launchers import Look
from jobs.ray.api import line

Obj = dict[str, Any]  # an object of the API, as it is
ENDED = ("Complete", "Failed")
QUEUE = "kueue.x-k8s.io/queue-name"
ROLE = "ray.io/node-type"  # of the pods of a RayCluster; the submitter has none
TAKE_UP_S = 30.0  # in which operators that run have taken up a RayJob
PREEMPTION = " preemption: "  # where the scheduler goes on to say whom it could not send away
NOTHING_SPECIAL = ("ContainerCreating", "PodInitializing")
WELL, STARTING, TROUBLED = range(3)
# What KubeRay says when it takes away a pod that has ended: the pod itself, with its own story, is gone by then.
REPLACED = re.compile(r"Deleted (?:head|worker) Pod \S+/(\S+); Pod status: (\w+);"
                      r"(?:.*ExitCode:(\d+),.*Reason:(\w+))?", re.DOTALL)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the API knows of a RayJob and of what was made for it."""

    job: Obj
    pods: list[Obj] = field(default_factory=list)
    events: list[Obj] = field(default_factory=list)
    workload: Obj | None = None  # Kueue's
    unread: list[str] = field(default_factory=list)  # what this account cannot see, and why


def tell(seen: Seen, now: float) -> Look:
    """Whether the RayJob goes on, and what it waits for or how it ended."""
    meta, status = seen.job["metadata"], _status(seen.job)
    deployment, result = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if meta.get("deletionTimestamp"):
        alive, state, why = True, "being deleted", ""
    else:
        alive = deployment not in ENDED
        if deployment == "ValidationFailed":  # of an edit, where there is a cluster: that one works on
            alive = bool(status.get("rayClusterName"))
        detail = {"Complete": result, "Failed": status.get("reason", "")}.get(deployment, "")
        if deployment == "Running" and result not in ("", "RUNNING"):
            detail = f"its job is {result}"
        state = (deployment or "new") + (f" ({detail})" if detail else "")
        why = _why(seen, now)
    parts = [why] * bool(why) + seen.unread
    return Look(alive, f"RayJob {meta['name']} in namespace {meta['namespace']} is {state}" + _colon("; ".join(parts)))


def well(job: Obj, pods: list[Obj]) -> bool:
    """Nothing is to be explained."""
    status = _status(job)
    if status.get("jobDeploymentStatus") == "Complete":
        return status.get("jobStatus") == "SUCCEEDED"
    going = status.get("jobDeploymentStatus") == "Running" and status.get("jobStatus") == "RUNNING"
    return going and not any(troubled(pod) for pod in pods)


def troubled(pod: Obj) -> bool:
    """Not ready, whatever the reason."""
    return _pod(pod, [])[0] != WELL


def newest_submitter(pods: list[Obj]) -> list[Obj]:
    """The pods without submitters that have been tried before the newest."""
    submitters = [pod for pod in pods if ROLE not in pod["metadata"].get("labels", {})]
    old = sorted(submitters, key=made)[:-1]
    return [pod for pod in pods if pod not in old]


def seconds(stamp: str | None) -> float:
    """A time of the API, since the epoch; 0 for none."""
    return datetime.fromisoformat(stamp).timestamp() if stamp else 0.0


def made(thing: Obj) -> float:
    """When an object was created, since the epoch."""
    return seconds(thing["metadata"].get("creationTimestamp"))


def _why(seen: Seen, now: float) -> str:
    job, status = seen.job, _status(seen.job)
    if job["spec"].get("suspend"):
        return _queued(seen, now)
    if not status.get("jobDeploymentStatus"):
        age_s = now - made(job)
        if age_s < TAKE_UP_S:
            return "it waits for the KubeRay operator"
        return f"nobody has taken it up for {duration(age_s)}: is the KubeRay operator running, and for this namespace?"
    deployment, result = status["jobDeploymentStatus"], status.get("jobStatus")
    own = line(status.get("message", ""))
    if deployment == "Complete":
        return own
    if deployment == "Running" and result in ("RUNNING", "SUCCEEDED"):
        own = ""
    weight, pod = _worst(seen)
    around = pod if weight == TROUBLED else _event(seen) or _failure(status) or pod
    return "; ".join(filter(None, (own, around)))


def _queued(seen: Seen, now: float) -> str:
    """What a suspended RayJob waits for."""
    queue = seen.job["metadata"].get("labels", {}).get(QUEUE, "")
    if not queue:
        return "it is held, and nothing has released it yet"
    where = f"in Kueue's queue {queue}"
    if not seen.workload:
        lack = "; Kueue has made no Workload of it: is Kueue running, with RayJobs among its integrations?"
        return where + ("" if seen.unread or now - made(seen.job) < TAKE_UP_S else lack)
    if not seen.workload["spec"].get("active", True):
        return f"{where}: its Workload has been deactivated"
    status = _status(seen.workload)
    reserved, evicted = _condition(seen.workload, "QuotaReserved"), _condition(seen.workload, "Evicted")
    found = [evicted.get("message", "")] if evicted.get("status") == "True" else []
    found += [reserved.get("message", "")] if reserved.get("status") == "False" else []
    found += [f"{check['name']} is {check['state']}{_colon(check.get('message', ''))}"
              for check in status.get("admissionChecks", ()) if check["state"] != "Ready"]  # fmt: skip
    newest = max((e for e in seen.events if _of(e) == "Workload"), key=_when, default={})
    words = "; ".join(dict.fromkeys(filter(None, found))) or newest.get("message", "")
    return where + _colon(line(words))


def _worst(seen: Seen) -> tuple[int, str]:
    """The pod in most trouble, nodes before the submitter, and how many others say the same."""
    told = [(pod, *_pod(pod, [e for e in seen.events if _of(e) == "Pod" and _about(e) == pod["metadata"]["name"]]))
            for pod in newest_submitter(seen.pods)]  # fmt: skip
    pod, weight, words = max(told, key=_rank, default=({}, WELL, ""))
    if weight == WELL:
        return WELL, ""
    others = sum((much, text) == (weight, words) for _, much, text in told) - 1
    how = " is starting" if weight == STARTING else " is pending" if _status(pod).get("phase") == "Pending" else ""
    return weight, f"pod {pod['metadata']['name']}{how}{_colon(words)}" + (f" (and {others} more)" if others else "")


def _rank(told: tuple[Obj, int, str]) -> tuple[int, bool, float]:
    pod, weight, _ = told
    return weight, ROLE in pod["metadata"].get("labels", {}), made(pod)


def _pod(pod: Obj, events: list[Obj]) -> tuple[int, str]:
    """How a pod is, and what it says of that itself or else by its events."""
    status = _status(pod)
    phase, ready = status.get("phase"), _condition(pod, "Ready").get("status") == "True"
    disrupted, scheduled = _condition(pod, "DisruptionTarget"), _condition(pod, "PodScheduled")
    if status.get("reason"):  # Evicted, NodeLost, Shutdown ...
        return TROUBLED, line(f"{status['reason']}{_colon(status.get('message', ''))}")
    if disrupted.get("status") == "True":  # its node is wanted by somebody else, or gone
        return TROUBLED, line(f"{disrupted.get('reason')}{_colon(disrupted.get('message', ''))}")
    if phase == "Succeeded" or ready:
        return WELL, ""
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if words := _container(container, events):
            return TROUBLED, line(words)
    if scheduled.get("status") == "False" and scheduled.get("message"):
        return TROUBLED, line(scheduled["message"].partition(PREEMPTION)[0])
    if phase == "Failed":
        return TROUBLED, "it has failed"
    newest = max(events, key=lambda event: (_when(event), _warns(event)), default={})
    if newest and _warns(newest):  # what has been warned of before is over
        return TROUBLED, _said(newest)
    if phase == "Running" and ROLE not in pod["metadata"].get("labels", {}):
        return WELL, ""  # a submitter is not asked whether it is ready
    return STARTING, line(newest.get("message", ""))


def _container(container: Obj, events: list[Obj]) -> str:
    """What keeps a container from working; "" = nothing special."""
    state, last = container.get("state") or {}, (container.get("lastState") or {}).get("terminated")
    waiting, ended = state.get("waiting") or {}, state.get("terminated")
    if ended:
        return _ending(ended) if ended["exitCode"] else ""
    reason = waiting.get("reason", "")
    if reason and reason not in NOTHING_SPECIAL:
        pulls = [e for e in events if e.get("reason") == "Failed" and "pull image" in e.get("message", "")]
        if reason == "ImagePullBackOff" and pulls:  # which says of itself that it waits, not for what
            return f"{reason}: {max(pulls, key=_when)['message']}"
        return str(reason) + _colon(f"it ended with {_ending(last)}" if last else waiting.get("message", ""))
    return f"it starts again, after {_ending(last)}" if last and not container.get("ready") else ""


def _ending(ended: Obj) -> str:
    return f"{ended.get('reason', 'Error')} (exit code {ended['exitCode']}){_colon(ended.get('message', ''))}"


def _event(seen: Seen) -> str:
    """The newest thing that the operators have to say against the RayJob, its cluster or its submitter."""
    newest_pod = max(map(made, seen.pods), default=0.0)
    for event in sorted(seen.events, key=_when, reverse=True):
        reason, message = event.get("reason", ""), event.get("message", "")
        if _of(event) not in ("RayJob", "RayCluster", "Job"):
            continue
        if gone := REPLACED.search(message):
            name, phase, code, cause = gone.groups()
            return f"pod {name} ended and is made anew: " + (f"{cause} (exit code {code})" if code else phase)
        made_since = reason.startswith("FailedToCreate") and _when(event) < newest_pod
        if _warns(event) and not made_since:
            return _said(event)
    return ""


def _failure(status: Obj) -> str:
    """What the RayCluster's status has against it, for those who may not read events."""
    failure = _condition({"status": status.get("rayClusterStatus")}, "ReplicaFailure")
    return line(f"{failure.get('reason')}: {failure.get('message')}") if failure.get("status") == "True" else ""


def _status(thing: Obj) -> Obj:
    return thing.get("status") or {}


def _condition(thing: Obj, kind: str) -> Obj:
    return next((c for c in _status(thing).get("conditions") or () if c["type"] == kind), {})


def _of(event: Obj) -> str:
    return str(event["involvedObject"].get("kind", ""))


def _about(event: Obj) -> str:
    return str(event["involvedObject"].get("name", ""))


def _warns(event: Obj) -> bool:
    return event.get("type") == "Warning"


def _said(event: Obj) -> str:
    return line(f"{event.get('reason', '')}{_colon(event.get('message', '').partition(PREEMPTION)[0])}")


def _when(event: Obj) -> float:
    """When it was seen last: which field holds that depends on who wrote the event."""
    series = event.get("series") or {}
    stamps = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"),
              event.get("firstTimestamp"), event["metadata"].get("creationTimestamp"))  # fmt: skip
    return max(map(seconds, stamps))


def _colon(words: str) -> str:
    return f": {words}" if words else ""
