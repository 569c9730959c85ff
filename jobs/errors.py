"""What can go wrong and which exit code says so: 2 the user's input, 3 the environment, 75 preempted, 1 a bug."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable

from core import shortage
from core.text import control

OK, BUG, USER, NOT_READY, HUNG, PREEMPTED = 0, 1, 2, 3, 70, 75
# Errors of core that are the user's or the environment's, with their exit codes. By name: a login node loads neither.
EXPECTED = (
    ("core.merge", "ConfigError", USER),
    ("core.data.source", "DataError", USER),
    ("core.features.codec", "FeatureError", USER),
    ("core.models.weights", "WeightsError", USER),
    ("core.storage", "StoreError", NOT_READY),
    ("core.guard", "BadLossError", BUG),
    ("core.manifest", "CheckpointError", BUG),
)
FAULTS = {"DistError", "DistBackendError", "DistNetworkError", "AcceleratorError", "OutOfMemoryError"}  # torch's
# Of variables: words of a secret, and names that hold such a word and only say where one is or how it is used.
SECRET_NAME = re.compile(r"SECRET|TOKEN|CREDENTIAL|PASS(W|PHRASE|CODE)|AUTHORI[SZ]ATION|(KEY|PASS|PWD|AUTH)S?(?![A-Z])")
NO_SECRET = re.compile(r"TOKENIZERS|^.*_(FILE|PATH|DIR|SOCK|MODE)$|^(OLD)?PWD$|COMPASS|BYPASS|MONKEY|(PARTITION_|P)KEY")
USER_INFO = re.compile(r"(\w[\w+.-]*://)[^/\s:@]*:[^\s\"'<>]{1,1024}@(?!sha256:)|(https?://)[^/\s:@]+@")
SIGNATURE = re.compile(r"(?i)([?&][\w-]*(?:signature|credential|token|secret|password|key)[\w-]*=)[^&\s\"'<>]+")


class JobError(Exception):
    """An error with a message for people and no traceback."""

    code = BUG


class UserError(JobError):
    """The input is wrong; the message names it and the fix."""

    code = USER


class NotReady(JobError):  # noqa: N818 - reads as what it says
    """The input is right, this machine or account is not ready for it; the message says how to get there."""

    code = NOT_READY


def exit_code(error: BaseException) -> int | None:
    """Exit code of an expected error; None for a bug, which deserves its traceback."""
    known = _expected(error)
    if known is not None:
        return known
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in ("core", "jobs", "tests"):
        return NOT_READY
    return NOT_READY if shortage.told(error) else None


def _expected(error: BaseException) -> int | None:
    if isinstance(error, JobError):
        return error.code
    for module, name, code in EXPECTED:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return code
    return None


def message(error: BaseException) -> str:
    """One clear text for an expected error, without credentials."""
    if isinstance(error, ModuleNotFoundError):
        return f"Python package {error.name} is missing: run `make setup`"
    return redact(_shortage(error) or str(error))


def _shortage(error: BaseException) -> str:
    """Unless the error is one of those that say themselves what to do."""
    return "" if _expected(error) is not None else shortage.told(error)


def code_of(error: BaseException) -> int:
    """Exit code of a process that works: those of devices and of connections to other ranks are the machine's."""
    known = exit_code(error)
    return known if known is not None else NOT_READY if _is_fault(error) else BUG


def describe(error: BaseException) -> str:
    """The message of an expected error, the traceback of another; without credentials."""
    if exit_code(error) is not None:
        return f"error: {message(error)}"
    fault = "The device failed, or the connection to another rank was lost, whose log then says more."
    what = fault if _is_fault(error) else "This is a bug in Retort: please report it with the lines above."
    return f"{redact(''.join(traceback.format_exception(error)))}{what}"


def _is_fault(error: BaseException) -> bool:
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)  # it has no class of its own
    return gloo or bool(FAULTS & {kind.__name__ for kind in type(error).__mro__})


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing."""
    match = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {match[0]}?" if match else ""


def redact(text: str) -> str:
    """The text with the values of secret environment variables and what lets one in at URLs blotted out."""
    secrets = {v for k, v in os.environ.items() if is_secret(k) and len(v) >= 6}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = USER_INFO.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return SIGNATURE.sub(r"\1***", text)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what is not to be shown."""
    return bool(SECRET_NAME.search(NO_SECRET.sub("", name.upper())))


def line(text: str, what: str) -> str:
    """The text, known to be one line without control characters.  Raises UserError."""
    if found := control(text):
        raise UserError(f"{what}: must be one line, and {text[:200]!r} holds {found}")
    return text
