"""Text that others have written: refused where a value must be one plain line, made harmless where people read it."""

from __future__ import annotations

import re

# What moves a terminal's cursor, ends a line, turns the direction of writing, or is no character at all.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
KEPT = "\n\t"  # of a text of several lines
# Sequences that colour, move or name: CSI, OSC and the like up to their ends, and escapes of two letters.
SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\\\|\x9c)"
    "|\x1b[ -/]*[0-Z\\\\`-~]"
)


def control(text: str, lines: bool = False) -> str:
    """The first control character, as `\\x1b`; "" when there is none.  lines: a text of several lines is fine."""
    found = next((one for one in CONTROL.findall(text) if not (lines and one in KEPT)), "")
    return _named(found) if found else ""


def shown(text: str, spelt: bool = True) -> str:
    """The text for a terminal or a page: its lines and tabs, without escape sequences.

    spelt: other control characters are spelt out, else left out.
    """
    text = SEQUENCE.sub("", text).replace("\r\n", "\n")
    return CONTROL.sub(lambda found: found[0] if found[0] in KEPT else _named(found[0]) if spelt else "", text)


def one_line(text: str) -> str:
    """As `shown`, in one line: for names and other values that are shown among the program's own words."""
    return CONTROL.sub(lambda found: _named(found[0]), shown(text))


def _named(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
