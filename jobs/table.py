"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from core.text import one_line


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, numbers to the right; each row in one line, whatever its cells hold."""
    head, rows = list(map(one_line, head)), [list(map(one_line, row)) for row in rows]
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(".", "", 1).removeprefix("-").isdigit()
