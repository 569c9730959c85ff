"""What a verb prints: nothing of it moves the terminal, and no credential is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.storage import open_store
from jobs import cli
from jobs.errors import is_secret, redact
from jobs.record import Run
from jobs.table import table
from jobs.terminal import guarded

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\x08"


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "DB_PASS", "PGPASSWORD", "MYSQL_PWD", "WANDB_KEY",
     "SSHPASS", "HTTP_AUTH", "PROXY_AUTHORIZATION", "GIT_CREDENTIALS", "KEY_2", "passphrase", "MyToken"],
)  # fmt: skip
def test_a_variable_that_is_named_like_a_secret_is_never_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter-hunter")
    assert is_secret(name)
    assert redact("it is hunter-hunter!") == "it is ***!"


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "SSH_AUTH_SOCK", "RAY_AUTH_MODE", "GIT_AUTHOR_NAME", "KEYBOARD", "PATH",
     "AWS_SHARED_CREDENTIALS_FILE", "NCCL_IB_PKEY", "PASSENGERS"],
)  # fmt: skip
def test_a_name_that_only_sounds_secret_hides_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/home/somebody")
    assert redact("in /home/somebody") == "in /home/somebody"


@pytest.mark.parametrize(
    ("text", "told"),
    [("s3://key:sec/ret@bucket/x", "s3://***@bucket/x"), ("s3://key:se@c/ret@bucket", "s3://***@bucket"),
     ("redis://:secret@host", "redis://***@host"), ("https://ghp_0123@github.com/x", "https://***@github.com/x"),
     ("https://b/x?X-Amz-Signature=0a1b&part=1", "https://b/x?X-Amz-Signature=***&part=1"),
     ("docker://host:5000/name@sha256:0a", "docker://host:5000/name@sha256:0a"),
     ("s3://bucket/a:b@c", "s3://bucket/a:b@c"), ("file:///x", "file:///x"),
     ("at 12:30 by me@host", "at 12:30 by me@host")],
)  # fmt: skip
def test_what_lets_one_in_at_an_address_is_blotted_out(text: str, told: str) -> None:
    assert redact(text) == told


def test_cells_of_a_table_stay_in_their_row() -> None:
    assert table(["a"], [["x\nroot  ok\x1b[2J"]]).splitlines()[-1] == "x\\nroot  ok"


def test_all_that_is_printed_meanwhile_is_made_safe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "0123456789")
    with guarded():
        print(f"a{HOSTILE}\tb 0123456789", flush=True)
    print("\x1b")
    assert capsys.readouterr().out == "a\\u202e\\x08\tb ***\n\x1b\n"


def hostile_run(root: str) -> Run:
    run = Run(root, "demo-0123456789")
    record = {"recipe": f"demo{HOSTILE}\nnext      make gc", "dotlist": [], "commit": HOSTILE}
    run.create("method: {name: unic}\n", record)
    run.store.put("logs/attempt-0000/rank-0000.log", f"at work{HOSTILE}\r50 %\r\nhttps://me:pa/ss@host\n".encode())
    return run


@pytest.mark.parametrize("arguments", [["status"], ["logs"], ["gc", "--dry"], ["resume"]])
def test_no_verb_prints_what_a_stranger_wrote_into_a_record_or_a_log_as_it_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"file://{tmp_path}/store"
    run = hostile_run(root)
    chosen = [run.id] if arguments[0] != "gc" else []
    cli.main([*arguments, *chosen, "--store", root])
    said = "".join(capsys.readouterr())
    assert said
    assert not {"\x1b", "\u202e", "\x08", "\r"} & set(said)
    assert "pa/ss" not in said
    assert "\nnext      make gc" not in said


def test_errors_are_made_safe_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"file://{tmp_path}/store"
    open_store(root).put(f"sweeps/x{HOSTILE}.json", json.dumps({}).encode())
    assert cli.main(["status", "--sweep", "nothing", "--store", root]) == 2
    said = capsys.readouterr().err
    assert "there is no sweep" in said
    assert "\x1b" not in said
