"""Standard output of a verb: what records, logs and stores hold is shown there, and none of it moves the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from core.text import shown
from jobs.errors import redact


@contextmanager
def guarded() -> Iterator[None]:
    """Everything that is printed meanwhile goes through `safe`, wherever it was read."""
    plain = sys.stdout
    sys.stdout = Guarded(plain)
    try:
        yield
    finally:
        sys.stdout = plain


def safe(text: str) -> str:
    """The text without credentials and without what a terminal would obey."""
    return shown(redact(text))


class Guarded:
    """A stream whose text is made safe on its way; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(safe(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
