"""HTML built from text that is escaped unless it was made here; numbers for people.

A page needs nothing but itself: no script, no font, no image, no request.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Sequence

from core.report.style import style
from core.text import shown

VOID = ("meta", "br")
NONE = "\u2013"


class Html(str):
    """Markup that may be inserted as it is; made by `tag` and `esc` alone."""

    __slots__ = ()


def esc(value: object) -> Html:
    """Any text as harmless markup."""
    return value if isinstance(value, Html) else Html(html.escape(shown(str(value), spelt=False)))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(esc(between).join(esc(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; `cls` is the attribute class, `_` in names stands for `-`, None leaves an attribute out."""
    given = {("class" if k == "cls" else k.replace("_", "-")): v for k, v in attributes.items() if v is not None}
    start = name + "".join(f' {k}="{esc(v)}"' for k, v in given.items())
    return Html(f"<{start}>") if name in VOID else Html(f"<{start}>{join(children)}</{name}>")


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]], strong: int | None = None,
          slim: bool = False) -> Html:  # fmt: skip
    """columns: (title, class of its cells).  strong: number of the row to emphasise.  slim: no wider than needed."""
    head = tag("tr", *(tag("th", title, cls=cls or None, scope="col") for title, cls in columns))
    body = [
        tag("tr", *(tag("td", cell, cls=cls or None) for cell, (_, cls) in zip(row, columns, strict=True)),
            cls="strong" if at == strong else None)
        for at, row in enumerate(rows)
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), cls="slim" if slim else None), cls="scroll")


def code(text: object) -> Html:
    return tag("code", text)


def warning(*children: object) -> Html:
    return tag("p", *children, cls="note bad")


def page(title: str, *body: object) -> Html:
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Html(style())),
    ]
    content = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return Html("<!doctype html>\n" + content + "\n")


# -- numbers ------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 4) -> str:
    """Significant digits, no padding: 0.6406, 1.04e-6, 12,345."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def value(given: object) -> str:
    """A cell's text, whatever it holds."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return number(given)
    return "" if given is None else str(given)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min, 3 d 4 h"""
    if not math.isfinite(seconds):
        return NONE
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(seconds: float) -> str:
    """Seconds since the epoch as a date and time of day in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
