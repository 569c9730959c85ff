"""RayJobs through a Kubernetes API server: what is asked of it, and what is made of its refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli, launchers
from jobs.errors import JobError, NotReady, UserError
from jobs.ray import api, kube
from jobs.ray.command import tagged
from jobs.ray.kube import Kube
from jobs.ray.manifest import job_name
from jobs.record import Run, State
from jobs.spec import REPOSITORY
from tests.jobs.ray.test_events import ANSWERS, CLUSTER, HEAD, NAME, WORKER
from tests.kube_server import KubeServer, Refusal

JOB = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": NAME, "namespace": "ml"},
       "spec": {"suspend": True, "rayClusterSpec": {}}}  # fmt: skip
BUDGET = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": f"{NAME}-head"}, "spec": {}}
FULL = 'rayjobs.ray.io "demo" is forbidden: exceeded quota: jobs, requested: count/rayjobs.ray.io=1'


def answers(name: str) -> Path:
    return next(path for path in ANSWERS if path.stem == name)


def status(code: int, reason: str, message: str, **details: Any) -> dict[str, Any]:
    return Refusal(code, reason, message, **details).body


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(NotReady) as caught:
        call()
    return str(caught.value)


# ---- before anything is submitted


def test_a_cluster_with_kuberay_and_the_role_is_ready(server: KubeServer) -> None:
    Kube().check()
    assert server.objects("rayjobs") == [], "and nothing has been made to find out"


def test_who_may_not_read_namespaces_can_submit_all_the_same(server: KubeServer) -> None:
    server.forbidden.add(("get", "namespaces"))
    Kube().check()


def test_a_cluster_without_kuberay_is_told_apart(server: KubeServer) -> None:
    del server.served["ray.io/v1"]
    for call in (Kube().check, lambda: Kube().create([JOB]), lambda: Kube().delete(NAME)):
        assert "knows no RayJobs (ray.io/v1): install the KubeRay operator (k8s/README.md)" in refused(call)
    look = Kube().look(NAME)
    assert look.alive is None
    assert "knows no RayJobs" in look.text


def test_a_kuberay_of_another_version_is_none(server: KubeServer) -> None:
    server.served["ray.io/v1"] = ["rayclusters"]
    assert "knows no RayJobs" in refused(Kube().check)


def test_all_that_an_account_may_not_do_is_named_at_once(server: KubeServer) -> None:
    server.forbidden |= {("create", "rayjobs"), ("list", "events"), ("create", "poddisruptionbudgets")}
    said = refused(Kube().check)
    assert "may not create rayjobs, list events, create poddisruptionbudgets in namespace ml" in said
    assert "ask for the role of k8s/base" in said


def test_the_role_for_submitters_allows_what_is_asked_for() -> None:
    role = next(yaml.safe_load_all((REPOSITORY / "k8s" / "base" / "submitters.yaml").read_text()))
    allowed = {(verb, group, resource) for rule in role["rules"] for verb in rule["verbs"]
               for group in rule["apiGroups"] for resource in rule["resources"]}  # fmt: skip
    read_if_allowed = {("get", "", "pods/log"), ("list", "kueue.x-k8s.io", "workloads")}
    assert allowed >= {*kube.NEEDED, *read_if_allowed}


def test_a_missing_namespace_is_named(server: KubeServer) -> None:
    for call in (Kube("elsewhere").check, lambda: Kube("elsewhere").create([JOB])):
        assert 'namespaces "elsewhere" not found: create it, or name another one' in refused(call)


def test_a_token_that_has_expired_is_told_apart(server: KubeServer) -> None:
    own = server.token
    server.token = "another"
    said = refused(Kube().check)
    assert "does not accept this account's credentials (Unauthorized)" in said
    assert own not in said


def test_an_api_server_that_is_away_is_named(server: KubeServer) -> None:
    server.__exit__()
    said = refused(Kube().check)
    assert f"the API server {server.url} cannot be reached" in said
    assert "Connection refused" in said


@pytest.mark.parametrize("answer", [0, -1], ids=["breaks off", "hangs"])
def test_a_connection_that_is_lost_is_no_answer(
    server: KubeServer, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setattr(api, "ANSWER_S", 0.3)
    server.load(answers("running"))
    server.plan("GET", "pods", answer)
    look = Kube().look(NAME)
    assert look.alive is None
    assert "cannot be reached" in look.text
    assert len([line for line in server.seen if "/pods" in line]) == 1, "nothing is asked twice"


def test_a_certificate_of_somebody_else_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KubeServer(tmp_path, certificate=certificate(tmp_path)) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        said = refused(Kube().check)
    assert "do not trust each other" in said
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert server.seen == [], "and gets no token"


def test_a_busy_server_is_asked_later(server: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    server.plan("GET", "rayjobs", 503, status(503, "ServiceUnavailable", "etcd is away\nwith very-secret-value"))
    look = Kube().look(NAME)
    assert look.alive is None
    assert look.text.endswith("is busy or ill (503: etcd is away with ***): try again later")


# ---- making and taking away


def test_a_rayjob_takes_what_belongs_to_it_along(server: KubeServer) -> None:
    own = Kube()
    own.create([JOB, BUDGET])
    (job,), (budget,) = server.objects("rayjobs"), server.objects("poddisruptionbudgets")
    assert budget["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": NAME, "uid": job["metadata"]["uid"]}
    ]
    assert "ownerReferences" not in BUDGET["metadata"], "what was given is as it was"
    assert own.delete(NAME)
    assert server.objects("rayjobs") == server.objects("poddisruptionbudgets") == []
    assert not own.delete(NAME)
    assert "propagationPolicy=Background" in server.seen[-1]


def test_fields_that_the_cluster_does_not_know_are_not_dropped_in_silence(server: KubeServer) -> None:
    Kube().create([JOB, BUDGET])
    assert all("fieldValidation=Strict" in line for line in server.seen if line.startswith("POST"))
    unknown = 'RayJob in version "v1" cannot be handled: strict decoding error: unknown field "spec.authOptions"'
    server.plan("POST", "rayjobs", 400, status(400, "BadRequest", unknown))
    assert 'refuses: RayJob in version "v1" cannot be handled: strict decoding error: unknown field' in refused(
        lambda: Kube().create([JOB])
    )


def test_a_second_submission_of_the_same_name_is_refused(server: KubeServer) -> None:
    Kube().create([JOB])
    said = refused(lambda: Kube().create([JOB, BUDGET]))
    assert f"RayJob {NAME} is in namespace ml already" in said
    assert len(server.objects("rayjobs")) == 1, "and the first goes on"
    assert server.objects("poddisruptionbudgets") == []


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [(403, status(403, "Forbidden", FULL), f"a quota does not allow it: {FULL}: wait for other jobs to end"),
     (403, status(403, "Forbidden", "not you"), "this account may not do that: not you: ask for the role of k8s/base"),
     (422, status(422, "Invalid", 'RayJob.ray.io "demo" is invalid: many', causes=[
         {"reason": "FieldValueInvalid", "message": 'Invalid value: "x"', "field": "spec.backoffLimit"},
         {"reason": "FieldValueRequired", "message": "Required value", "field": "spec.rayClusterSpec"}]),
      'refuses: spec.backoffLimit: Invalid value: "x"; spec.rayClusterSpec: Required value'),
     (500, status(500, "InternalError", "failed calling webhook"), "is busy or ill (500: failed calling webhook)")],
)  # fmt: skip
def test_a_refusal_is_quoted_with_what_to_do(server: KubeServer, code: int, body: dict[str, Any], words: str) -> None:
    server.plan("POST", "rayjobs", code, body)
    assert words in refused(lambda: Kube().create([JOB]))


def test_nothing_is_left_when_the_second_document_is_refused(server: KubeServer) -> None:
    server.forbidden.add(("create", "poddisruptionbudgets"))
    assert 'cannot create resource "poddisruptionbudgets"' in refused(lambda: Kube().create([JOB, BUDGET]))
    assert server.objects("rayjobs") == []


def test_nothing_is_left_when_the_answer_is_lost(server: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ANSWER_S", 0.3)
    made, create = threading.Event(), server.create

    def make_and_hang(*arguments: Any) -> Any:
        create(*arguments)
        made.set()
        server.stopped.wait(20)

    monkeypatch.setattr(server, "create", make_and_hang)
    assert "cannot be reached" in refused(lambda: Kube().create([JOB]))
    assert made.is_set()
    assert server.objects("rayjobs") == []


@pytest.mark.parametrize(("name", "works"), [("running", True), ("submitted", False), ("kueue-no-quota", False),
                                             ("failed", False), ("pods-left", False)])  # fmt: skip
def test_a_rayjob_works_once_its_entry_point_does(server: KubeServer, name: str, works: bool) -> None:
    server.load(answers(name))
    assert Kube().working(NAME) is works


# ---- watching


def test_the_api_server_is_not_asked_again_within_seconds(server: KubeServer) -> None:
    server.load(answers("held"))
    own = Kube()
    first = own.look(NAME)
    asked = len(server.seen)
    assert [own.look(NAME) for _ in range(5)] == [first] * 5
    assert len(server.seen) == asked
    assert own.delete(NAME)
    assert own.look(NAME).alive is False, "but after a change of one's own"


def test_a_rayjob_that_may_not_be_seen_is_not_judged(server: KubeServer) -> None:
    server.load(answers("running"))
    server.forbidden.add(("get", "rayjobs"))
    look = Kube().look(NAME)
    assert look.alive is None
    assert 'User "jane" cannot get resource "rayjobs"' in look.text


def test_pods_of_a_deleted_rayjob_have_their_time_to_save(server: KubeServer) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
    server.load(answers("pods-left"))
    for pod in (HEAD, WORKER):
        server.change("pods", pod, {"metadata": {"deletionTimestamp": soon}})
    look = Kube().look(NAME)
    assert look.alive
    assert look.text.endswith("is not in namespace ml any more: 2 of its pods are still ending")
    for other in ("demo", NAME.removesuffix("-0001")):
        assert Kube().look(other).alive is False, "whose name only begins like theirs"


def test_logs_are_those_of_the_pods_that_have_any(server: KubeServer) -> None:
    server.load(answers("submitter-tries"))
    second = f"{CLUSTER}-gpu-worker-p6tzl"
    server.logs = {HEAD: b"ray start --head\n", second: b"\xff raylet\n", f"{NAME}-7gk4n": b"new\n",
                   f"{NAME}-2xxrs": b"old\n"}  # fmt: skip
    assert Kube().logs(NAME) == {
        "head.log": b"ray start --head\n", "worker-p6tzl.log": b"\xff raylet\n", "submitter.log": b"new\n",
        "submitter-2xxrs.log": b"old\n",
    }  # fmt: skip
    assert any(f"/pods/{HEAD}/log?container=ray-head&tailLines=" in line for line in server.seen)
    server.remove("rayjobs", NAME)
    assert "head.log" in Kube().logs(NAME), "as long as there are pods"
    server.forbidden.add(("list", "pods"))
    assert Kube().logs(NAME) == {}


# ---- which cluster


def test_without_a_kube_config_no_cluster_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not api.reachable()
    assert "there is no Kubernetes to ask" in refused(lambda: Kube().namespace)
    assert Kube().look(NAME).alive is None


def test_the_kube_config_of_the_home_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not api.reachable()
    with KubeServer(tmp_path) as server:
        (tmp_path / ".kube").mkdir()
        server.kubeconfig.rename(tmp_path / ".kube" / "config")
        assert api.reachable()
        Kube().check()


def test_contexts_are_chosen_by_name(server: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(server.kubeconfig.read_text())
    plain = {"name": "plain", "context": {"cluster": "toy", "user": "jane"}}
    (tmp_path / "more").write_text(yaml.safe_dump({**content, "contexts": [plain], "current-context": "plain"}))
    monkeypatch.setenv("KUBECONFIG", f"{server.kubeconfig}:{tmp_path / 'more'}")
    assert Kube().namespace == "ml", "the first file that names a current context wins, as with kubectl"
    assert Kube(context="plain").namespace == "default"
    assert Kube("own", "plain").namespace == "own"
    Kube("ml", "plain").check()
    with pytest.raises(UserError, match=r"kubernetes.context: there is no context 'plan' .*did you mean plain\?"):
        Kube(context="plan").check()
    assert Kube(context="plan").look(NAME).alive is None, "a run of a cluster that this machine does not know"


@pytest.mark.parametrize(
    ("at", "job"),
    [("kubernetes:prod/ml", ""), ("kubernetes:toy/kube-system", ""), ("kubernetes:a/b/prod/ml", ""),
     ("kubernetes:", "somebody-s-job"), ("kubernetes:/ml", "{own}-0001/../x"), ("kubernetes:", "{own}-1"),
     ("kubernetes:", None)],
)  # fmt: skip
def test_a_record_leads_to_no_other_context_namespace_or_job(
    server: KubeServer, new_run: Callable[..., Run], root: str, at: str, job: str | None
) -> None:
    content = yaml.safe_load(server.kubeconfig.read_text())
    [toy] = content["contexts"]
    server.kubeconfig.write_text(yaml.safe_dump({**content, "contexts": [toy, {**toy, "name": "prod"}]}))
    server.namespaces.add("kube-system")
    run = new_run(recipe="name: demo\n")
    own = tagged(run.id, root)
    name = job.format(own=own) if job else job_name(own, 1) if job == "" else job
    run.move(State.QUEUED, 1, launcher="ray", at=at, job=name)
    look = run.look(run.last())
    assert look.alive is None
    assert "nobody was asked" in look.text
    for words in (["status"], ["status", run.id], ["logs", run.id], ["cancel", run.id], ["cancel", run.id]):
        assert cli.main([*words, "--store", root]) == 0
    assert server.seen == []


def test_a_record_of_the_context_and_namespace_in_use_leads_there(
    server: KubeServer, new_run: Callable[..., Run], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ml.yaml").write_text("image: a/b\nkubernetes: {namespace: ml}\n")
    monkeypatch.setenv("RETORT_CLUSTER", f"{tmp_path}/ml.yaml")
    [toy] = yaml.safe_load(server.kubeconfig.read_text())["contexts"]
    run = new_run()
    for at in (f"kubernetes:{toy['name']}/ml", f"kubernetes:{toy['name']}/", "kubernetes:/"):
        own = tagged(run.id, root)
        info = {"launcher": "ray", "at": at, "job": job_name(own, 3)}
        launcher = launchers.of(info)
        assert launcher.look(run, info).text == f"RayJob {job_name(own, 3)} is not in namespace ml any more"
    assert server.seen


def test_the_cluster_file_says_where_to_look(
    server: KubeServer, new_run: Callable[..., Run], root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.namespaces.add("own")
    (tmp_path / "own.yaml").write_text("image: a/b\nkubernetes: {namespace: own}\n")
    run = new_run(recipe="name: demo\n")
    [toy] = yaml.safe_load(server.kubeconfig.read_text())["contexts"]
    run.move(State.QUEUED, 1, launcher="ray", at=f"kubernetes:{toy['name']}/own", job=job_name(tagged(run.id, root), 1))
    assert cli.main(["status", run.id, "--store", root]) == 0
    assert "nobody was asked; CLUSTER=..." in capsys.readouterr().out
    assert cli.main(["status", run.id, "--store", root, "--cluster", f"{tmp_path}/own.yaml"]) == 0
    assert "is not in namespace own any more" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["clusters: [", "[]", "contexts: [{name: a}]", "contexts: 3"])
def test_what_is_no_kube_config_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert not api.reachable()
    with pytest.raises(JobError, match=str(path)):
        Kube().check()


def test_a_pod_uses_its_own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = certificate(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with KubeServer(tmp_path, "in-pod", pem) as server:
        host, _, port = server.url.removeprefix("https://").partition(":")
        for name, text in (("token", server.token), ("namespace", "in-pod\n"), ("ca.crt", pem.read_text())):
            (tmp_path / name).write_text(text)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        assert not api.reachable(), "without an account"
        monkeypatch.setattr(api, "ACCOUNT", tmp_path)
        for constant, name in (("SERVICE_TOKEN_FILENAME", "token"), ("SERVICE_CERT_FILENAME", "ca.crt")):
            monkeypatch.setattr(f"kubernetes.config.incluster_config.{constant}", str(tmp_path / name))
        assert api.reachable()
        assert Kube().namespace == "in-pod"
        Kube().check()


def test_a_cluster_on_this_machine_is_not_looked_for_behind_a_proxy(
    server: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    Kube().check()


def certificate(folder: Path) -> Path:
    """Key and certificate of a server on loopback that nobody has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "toy")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        .add_extension(address, False).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form)
                     + signed.public_bytes(serialization.Encoding.PEM))  # fmt: skip
    return path
