"""HTML built from text that is escaped unless it was made here; numbers for people; the look of a page.

A page needs nothing but itself: no script, no font, no image, no request.
"""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Iterable, Sequence

VOID = ("meta", "br")
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours of terminals, characters HTML forbids
NONE = "\u2013"


class Html(str):
    """Markup that may be inserted as it is; made by `tag` and `esc` alone."""

    __slots__ = ()


def esc(value: object) -> Html:
    """Any text as harmless markup."""
    return value if isinstance(value, Html) else Html(html.escape(CONTROL.sub("", str(value))))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(esc(between).join(esc(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `cls` is the attribute class, `_` in names stands for `-`, None leaves an attribute out."""
    given = {("class" if k == "cls" else k.replace("_", "-")): v for k, v in attributes.items() if v is not None}
    start = name + "".join(f' {k}="{esc(v)}"' for k, v in given.items())
    return Html(f"<{start}>") if name in VOID else Html(f"<{start}>{join(children)}</{name}>")


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]], strong: Sequence[int] = ()) -> Html:
    """columns: (title, class of its cells).  strong: numbers of the rows to emphasise.  Scrolls sideways when narrow."""
    head = tag("tr", *(tag("th", title, cls=cls or None, scope="col") for title, cls in columns))
    body = [
        tag("tr", *(tag("td", cell, cls=cls or None) for cell, (_, cls) in zip(row, columns, strict=True)),
            cls="strong" if number in strong else None)
        for number, row in enumerate(rows)
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), cls="scroll")


def code(text: object) -> Html:
    return tag("code", text)


def page(title: str, *body: object) -> Html:
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Html(STYLE)),
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


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min, 3 d 4 h"""
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


# -- the look -----------------------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f7f8f9;--ink:#1b1f24;--soft:#5b6570;--line:#dfe3e8;--tint:#eef4ff;
--good:#12703c;--bad:#b3261e;--busy:#0b57b0;
--s0:#0b62c4;--s1:#c2520a;--s2:#15803d;--s3:#8b2fb0;--s4:#0e7490;--s5:#b42360;--s6:#7a6200;--s7:#5b6570}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--panel:#1c2024;--ink:#e7eaee;--soft:#9aa5b1;--line:#30363d;
--tint:#1b2a40;--good:#5fd08f;--bad:#ff8a80;--busy:#7fb5ff;
--s0:#6cabff;--s1:#ff9d5c;--s2:#5fd08f;--s3:#d292f0;--s4:#56c7de;--s5:#ff86b5;--s6:#d9bd4a;--s7:#9aa5b1}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 24px 56px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;font-weight:650;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--line);font-weight:620}
h3{font-size:14.5px;margin:24px 0 6px;font-weight:620}
p{margin:6px 0 10px;max-width:78ch}
.soft,small{color:var(--soft)} small{font-size:12.5px}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:12.5px}
code{overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:12px 14px;overflow-x:auto;margin:8px 0 12px;
line-height:1.5;tab-size:2}
.top{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center}
.kicker{color:var(--soft);font-size:12.5px;margin:0 0 4px}
.state{font-size:12.5px;font-weight:600;border:1px solid currentColor;border-radius:99px;padding:1px 11px;color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}.busy{color:var(--busy)}
.lead{font-size:16.5px;max-width:70ch;margin:10px 0 4px;overflow-wrap:anywhere}
.note{border-left:3px solid var(--line);padding:2px 0 2px 14px;margin:14px 0}
.note.bad{border-color:var(--bad);color:inherit}.note.busy{border-color:var(--busy);color:inherit}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:1px;margin:26px 0 0;padding:0;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tile{background:var(--bg);padding:13px 16px 12px}
.tile dt{color:var(--soft);font-size:12.5px}
.tile dd{margin:0;font-size:25px;line-height:1.3;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tile dd small{display:block;font-weight:400;letter-spacing:0;line-height:1.4}
.scroll{overflow-x:auto;margin:8px 0 10px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums lining-nums}
th{font-weight:500;font-size:12.5px;color:var(--soft);text-align:left;vertical-align:bottom}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
td{text-align:left} th.num,td.num{text-align:right;white-space:nowrap;width:1%;padding-left:14px}
td.name,td.when{white-space:nowrap} td.mono{overflow-wrap:anywhere;min-width:16ch} td.wide,th.wide{width:34%;min-width:120px}
td.soft,th.soft{color:var(--soft)} td pre{margin:2px 0}
tr.strong td{background:var(--tint);font-weight:650} tr.strong td:first-child{box-shadow:-8px 0 0 var(--tint)}
.bar{display:block;height:9px;margin-top:7px;border-radius:2px;background:var(--s7);opacity:.45;min-width:1px;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
tr.strong .bar{background:var(--s0);opacity:1}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:18px 26px;margin:12px 0 6px}
figure{margin:0;break-inside:avoid;min-width:0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;font-size:13px;line-height:1.4}
figcaption b{font-weight:600;overflow-wrap:anywhere} figcaption i{font-style:normal;color:var(--soft)}
.last{font-variant-numeric:tabular-nums;font-size:12.5px} .last span{margin-left:9px;white-space:nowrap}
.keys{display:flex;flex-wrap:wrap;gap:2px 20px;font-size:13px;margin:4px 0}
.keys span{display:inline-flex;align-items:center;gap:7px;overflow-wrap:anywhere} .keys svg{width:26px;height:8px;flex:none}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:10.5px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1;opacity:.6}
.stage{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.curve{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
.dot{fill:currentColor}.broken{stroke:var(--bad);stroke-width:1.4}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}.all{color:var(--ink)}
dl.facts{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:5px 22px;margin:8px 0 12px;font-size:14px}
dl.facts dt{color:var(--soft)} dl.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
details{margin:8px 0} summary{cursor:pointer;font-weight:550;padding:3px 0}
footer{margin-top:44px;padding-top:12px;border-top:1px solid var(--line);color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
@media (max-width:560px){main{padding:24px 16px 40px}h1{font-size:25px}.tiles{grid-template-columns:1fr 1fr}.tile dd{font-size:21px}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:8px}}
@media print{:root{--bg:#fff;--panel:#fff;--ink:#000;--soft:#444;--line:#ccc;--tint:#eef4ff;--good:#12703c;--bad:#b3261e;
--busy:#0b57b0;--s0:#0b62c4;--s1:#c2520a;--s2:#15803d;--s3:#8b2fb0;--s4:#0e7490;--s5:#b42360;--s6:#7a6200;--s7:#5b6570}
@page{margin:15mm}body{font-size:10.5pt}main{max-width:none;padding:0}h2,h3{break-after:avoid}tr,.tiles,.note{break-inside:avoid}
.charts{grid-template-columns:1fr 1fr 1fr}pre{white-space:pre-wrap}.scroll{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}}
"""
