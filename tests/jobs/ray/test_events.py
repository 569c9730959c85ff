"""What is said of a RayJob in states that are hard to bring about: answers of the API, in its own shapes.

answers/*.json are lists of objects as Kubernetes, KubeRay 1.7 and Kueue 0.19 write them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.ray import events
from jobs.ray.events import Seen
from jobs.ray.kube import Kube
from tests.k8s import schema
from tests.kube_server import KubeServer

ANSWERS = sorted(Path(__file__).with_name("answers").glob("*.json"))
NAME = "demo-0123456789-0001"
CLUSTER = f"{NAME}-x7k2p"
HEAD, WORKER, NEW = f"{CLUSTER}-head-9wq2m", f"{CLUSTER}-gpu-worker-4hvds", f"{CLUSTER}-gpu-worker-zz8cd"
QUOTA = ("exceeded quota: team-ml, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=12, "
         "limited: requests.nvidia.com/gpu=16")  # fmt: skip
NODES = ("0/5 nodes are available: 2 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
         "3 Insufficient nvidia.com/gpu.")  # fmt: skip
IMAGE = '"registry.example.com/ml/retort:4f2c"'
KUEUE = ("couldn't assign flavors to pod set gpu: insufficient unused quota for nvidia.com/gpu in flavor h100, "
         "8 more needed")  # fmt: skip
# By file: whether somebody works on it or will, and how the line ends.
TOLD = {
    # Nobody takes it up, or it has to wait.
    "operator-missing": (True, "is the KubeRay operator running, and for this namespace?"),
    "invalid": (False, "is ValidationFailed: The RayJob spec is invalid: authOptions.mode is token, which needs "
                "rayVersion 2.52.0 or newer"),
    "held": (True, "is Suspended: it is held, and nothing has released it yet"),
    "kueue-no-quota": (True, f"is Suspended: in Kueue's queue gpus: {KUEUE}"),
    "kueue-event-only": (True, f"is Suspended: in Kueue's queue gpus: {KUEUE}"),
    "kueue-no-queue": (True, "is Suspended: in Kueue's queue gpu: LocalQueue gpu doesn't exist"),
    "kueue-preempted": (True, f"due to prioritization in the ClusterQueue; {KUEUE}"),
    "kueue-check": (True, "is Suspended: in Kueue's queue gpus: capacity is Pending: Waiting for plan to be "
                    "provisioned. Provisioning Request wl-1 was successfully provisioned: false"),
    "kueue-silent": (True, "is Suspended: in Kueue's queue gpus; Kueue has made no Workload of it: is Kueue running, "
                     "with RayJobs among its integrations?"),
    # Its pods cannot be made or do not start.
    "quota": (True, f'FailedToCreateWorkerPod: Failed to create worker Pod for the cluster ml/{CLUSTER}, pods '
              f'"{WORKER}" is forbidden: {QUOTA}'),
    "quota-in-status": (True, f'is Initializing: FailedCreateWorkerPod: pods "{WORKER}" is forbidden: {QUOTA}'),
    "quota-freed": (True, f"is Initializing: pod {WORKER} is starting"),
    "no-gpus": (True, f"is Initializing: pod {WORKER} is pending: {NODES} (and 1 more)"),
    "no-gpus-event-only": (True, f"is Initializing: pod {WORKER} is pending: FailedScheduling: {NODES}"),
    "image-pull": (True, f"pod {HEAD} is pending: ErrImagePull: failed to pull and unpack image {IMAGE}: failed to "
                   f"resolve reference {IMAGE}: {IMAGE[1:-1]}: not found"),
    "image-pull-backoff": (True, "pull access denied, repository does not exist or may require authorization: "
                           "authorization failed: no basic auth credentials"),
    "no-secret": (True, f'pod {HEAD} is pending: CreateContainerConfigError: secret "retort-bucket" not found'),
    "no-volume": (True, f'pod {WORKER} is pending: FailedMount: MountVolume.SetUp failed for volume "cache" : hostPath '
                  "type check failed: /mnt/nvme/retort is not a directory"),
    "crash-loop": (True, f"is Initializing: pod {HEAD}: CrashLoopBackOff: it ended with Error (exit code 1)"),
    "pulling": (True, f"is Initializing: pod {WORKER} is starting: Pulling image {IMAGE}"),
    "starting": (True, f"is Initializing: pod {WORKER} is starting"),
    # It works, or has lost something.
    "running": (True, "is Running"),
    "submitted": (True, "is Running (its job is PENDING): Job has not started yet. It may be waiting for the runtime "
                  "environment to be set up."),
    "submitter-tries": (True, "is Running"),
    "finishing": (True, "is Running (its job is SUCCEEDED)"),
    "oom": (True, f"is Running: pod {WORKER}: OOMKilled (exit code 137)"),
    "oom-replaced": (True, f"is Running: pod {WORKER} ended and is made anew: OOMKilled (exit code 137)"),
    "evicted-replaced": (True, f"is Running: pod {WORKER} ended and is made anew: Failed"),
    "evicted": (True, f"is Running: pod {WORKER}: Evicted: The node was low on resource: ephemeral-storage. Threshold "
                "quantity: 53687091200, available: 41204Mi. Container ray-worker was using 812Gi, request is 0, has "
                "larger consumption of ephemeral-storage."),
    "preempted": (True, f"is Running: pod {WORKER}: PreemptionByScheduler: default-scheduler: preempting to "
                  "accommodate a higher priority pod"),
    "node-silent": (True, f"is Running: pod {WORKER}: NodeNotReady: Node is not ready"),
    "node-lost": (True, f"is Running: pod {WORKER}: NodeLost: Node gpu-3 which was running pod {WORKER} is "
                  "unresponsive"),
    "retrying": (True, "is Retrying: Job entrypoint command failed with exit code 1"),
    "deleted": (True, "is being deleted"),
    # It has ended.
    "succeeded": (False, "is Complete (SUCCEEDED): Job finished successfully."),
    "stopped": (False, "is Complete (STOPPED): Job was intentionally stopped."),
    "failed": (False, "error: the store s3://ml/retort cannot be reached: connect timeout"),
    "deadline": (False, "is Failed (DeadlineExceeded): The RayJob has passed the activeDeadlineSeconds. StartTime: "
                 "2026-03-01 09:00:04 +0000 UTC. ActiveDeadlineSeconds: 3600"),
    "submitter-failed": (False, "is Failed (SubmissionFailed): Job submission has failed. Reason: BackoffLimitExceeded"
                         ". Message: Job has reached the specified backoff limit; "
                         f"pod {NAME}-kk5tw: Error (exit code 1)"),
    "pods-left": (False, "is not in namespace ml any more"),
}  # fmt: skip


def items(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["items"]
    return found


def seen(name: str) -> Seen:
    """What a file of answers holds."""
    things = items(Path(__file__).with_name("answers") / f"{name}.json")
    (job,) = (thing for thing in things if thing["kind"] == "RayJob")
    return Seen(job, *([thing for thing in things if thing["kind"] == kind] for kind in ("Pod", "Event")))


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.stem)
def test_a_look_says_in_one_line_what_the_run_waits_for(server: KubeServer, path: Path) -> None:
    alive, words = TOLD[path.stem]
    server.load(path)
    look = Kube().look(NAME)
    assert look.alive is alive
    assert look.text.endswith(words)
    assert look.text.startswith(f"RayJob {NAME} ")
    assert "\n" not in look.text
    assert len(look.text) < 1000


@pytest.mark.parametrize("kind", ["pods", "events"])
def test_what_may_not_be_read_is_said_beside_what_is_known(server: KubeServer, kind: str) -> None:
    server.load(Path(__file__).with_name("answers") / "no-gpus.json")
    server.forbidden.add(("list", kind))
    look = Kube().look(NAME)
    assert look.alive
    assert look.text.startswith(f"RayJob {NAME} in namespace ml is Initializing")
    assert f'{kind} cannot be read: {kind} is forbidden: User "jane" cannot list resource "{kind}"' in look.text
    assert (NODES in look.text) is (kind == "events"), "a pod's own status says what its events do"


def test_a_queue_that_may_not_be_read_is_not_taken_for_a_missing_one(server: KubeServer) -> None:
    server.load(Path(__file__).with_name("answers") / "kueue-no-quota.json")
    server.forbidden.add(("list", "workloads"))
    text = Kube().look(NAME).text
    assert "in Kueue's queue gpus; workloads cannot be read" in text
    assert "is Kueue running" not in text


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_a_kueue_of_either_version_is_asked(server: KubeServer, version: str) -> None:
    server.load(Path(__file__).with_name("answers") / "kueue-no-quota.json")
    server.served[f"kueue.x-k8s.io/{version}"] = server.served.pop("kueue.x-k8s.io/v1beta2")
    assert Kube().look(NAME).text.endswith(KUEUE)


def test_a_queue_without_kueue_is_told_apart(server: KubeServer) -> None:
    server.load(Path(__file__).with_name("answers") / "kueue-no-quota.json")
    del server.served["kueue.x-k8s.io/v1beta2"]
    assert "is Kueue running, with RayJobs among its integrations?" in Kube().look(NAME).text


def test_a_run_in_good_health_is_asked_for_no_events(server: KubeServer) -> None:
    server.load(Path(__file__).with_name("answers") / "running.json")
    assert Kube().look(NAME).text.endswith("is Running")
    assert not [line for line in server.seen if "/events" in line]


def test_operators_have_some_time_to_take_a_run_up() -> None:
    fresh, queued = seen("operator-missing"), seen("kueue-silent")
    born = events.made(fresh.job)
    assert events.tell(fresh, born + 10).text.endswith("is new: it waits for the KubeRay operator")
    assert "taken it up for 5 min: is the KubeRay operator running" in events.tell(fresh, born + 300).text
    assert events.tell(queued, born + 10).text.endswith("is Suspended: in Kueue's queue gpus")
    assert "is Kueue running" in events.tell(queued, born + 300).text


def test_an_edit_that_the_operator_refuses_does_not_end_what_works() -> None:
    refused = seen("running")
    refused.job["status"] |= {"jobDeploymentStatus": "ValidationFailed", "message": "The RayJob spec is invalid"}
    look = events.tell(refused, 0)
    assert look.alive
    assert "is ValidationFailed: The RayJob spec is invalid" in look.text


def test_a_worker_in_trouble_comes_before_the_submitter() -> None:
    ended = seen("submitter-failed")
    ended.pods.extend(pod for pod in seen("oom").pods if pod["metadata"]["name"] == WORKER)
    assert events.tell(ended, 0).text.endswith(f"pod {WORKER}: OOMKilled (exit code 137)")


def test_a_pod_that_waits_again_outdoes_what_was_said_of_the_one_before() -> None:
    again = seen("oom-replaced")
    (new,) = (pod for pod in again.pods if pod["metadata"]["name"] == NEW)
    new["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NODES}
    ]
    assert events.tell(again, 0).text.endswith(f"pod {NEW} is pending: {NODES}")


def test_the_newest_of_two_things_said_against_a_cluster_counts() -> None:
    both = seen("quota")
    (old,) = (event for event in both.events if event["type"] == "Warning")
    later = {**old, "reason": "FailedToCreateService", "message": "no more", "lastTimestamp": "2026-03-01T09:30:00Z"}
    both.events.insert(0, later)
    assert events.tell(both, 0).text.endswith("is Initializing: FailedToCreateService: no more")
    later["lastTimestamp"] = "2026-03-01T09:01:00Z"
    assert QUOTA in events.tell(both, 0).text


def test_secrets_in_what_is_said_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    leaky = seen("failed")
    leaky.job["status"]["message"] = "cannot open\ns3 with very-secret-value at https://jane:pw@host/x"
    assert events.tell(leaky, 0).text.endswith("cannot open s3 with *** at https://***@host/x")


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.stem)
def test_answers_have_the_shapes_of_kubernetes(path: Path) -> None:
    from kubernetes import client

    models = {"Pod": client.V1Pod, "Event": client.CoreV1Event}
    for item in filter(lambda item: item["kind"] in models, items(path)):
        read = models[item["kind"]].model_validate(item)
        assert client.ApiClient(client.Configuration()).sanitize_for_serialization(read) == plain(item)


def test_answers_have_the_shapes_of_kuberay() -> None:
    if not schema.crds():
        pytest.skip(schema.MISSING)
    jobs = {path.stem: item for path in ANSWERS for item in items(path) if item["kind"] == "RayJob"}
    assert {name: schema.against_crd(job) for name, job in jobs.items()} == dict.fromkeys(jobs, [])


def plain(item: Any) -> Any:
    """An answer as the client's models write it: without nulls, times with an offset."""
    if isinstance(item, dict):
        return {key: plain(value) for key, value in item.items() if value is not None}
    if isinstance(item, list):
        return [plain(value) for value in item]
    return item.removesuffix("Z") + "+00:00" if isinstance(item, str) and item.endswith("Z") else item
