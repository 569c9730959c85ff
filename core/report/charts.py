"""Small line charts as inline SVG: one panel per quantity, readable axes, colours that follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.report.page import Html, join, number, tag
from core.report.style import COLOURS

LEFT, RIGHT, TOP, BOTTOM = 44, 8, 14, 30  # room around the curves
BUCKETS = 150  # a longer curve keeps the extremes of this many stretches
LOG_RATIO = 100  # positive values that span more get a logarithmic axis
PLAIN = "plain"  # style of a line that belongs to nobody


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]  # x ascending; a y that is not finite breaks the line and is marked
    style: str = PLAIN  # class that gives the colour
    keyed: bool = False  # a key beside the panels explains the colour


@dataclass(frozen=True)
class Panel:
    title: str
    series: Sequence[Series]
    unit: str = ""
    zero: bool = False  # the axis starts at zero and is linear
    x_name: str = "step"
    span: tuple[float, float] | None = None  # of the x axis; None: as far as the points go
    marks: Sequence[tuple[float, str]] = ()  # vertical lines with a word


@dataclass(frozen=True)
class Frame:
    """Size of a drawing; its text is as large as the page's when it is shown at this width."""

    width: int = 330
    height: int = 178

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def floor(self) -> int:
        return self.height - BOTTOM


SMALL, LARGE = Frame(), Frame(500, 220)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `low` and `high` are the ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def colour(index: int) -> str:
    return f"s{index % COLOURS}"


def chart(panel: Panel, frame: Frame = SMALL) -> Html:
    """The panel as a figure: title, unit and newest values in words, then the drawing."""
    newest = [_newest(s, several=len(panel.series) > 1) for s in panel.series]
    scale = "log scale" if _is_log(_finite(panel), panel.zero) else ""
    title = tag("span", tag("b", panel.title), " ", tag("i", " ".join(filter(None, (panel.unit, scale)))))
    return tag("figure", tag("figcaption", title, tag("span", *newest, cls="last")), draw(panel, frame))


def key(series: Sequence[tuple[str, str]]) -> Html:
    """Names beside samples of their lines: (name, style)."""
    sample = [
        tag("span", tag("svg", _line(0, 4, 26, 4, f"curve {style}"), viewBox="0 0 26 8", aria_hidden="true"), name)
        for name, style in series
    ]
    return tag("div", *sample, cls="keys")


def draw(panel: Panel, frame: Frame = SMALL) -> Html:
    """The SVG element.  A panel without a finite value is a sentence."""
    ys = _finite(panel)
    xs = panel.span or [x for s in panel.series for x, _ in s.points]
    if not ys:
        return tag("p", "No finite value.", cls="soft")
    x = Axis(*_spread(min(xs), max(xs)), LEFT, frame.right)
    y = _vertical(ys, panel.zero, frame)
    parts = [_grid(x, y, frame, panel.x_name), *(_mark(x, at, word, frame) for at, word in panel.marks)]
    parts += [_curve(s, x, y) for s in panel.series]
    return tag("svg", *parts, viewBox=f"0 0 {frame.width} {frame.height}", role="img", aria_label=_words(panel))


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], every second or third one when there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**k for k in range(first, last + 1, max(math.ceil((last - first) / 5), 1))]


def thin(points: Sequence[tuple[float, float]], buckets: int = BUCKETS) -> list[tuple[float, float]]:
    """Least, greatest and first non-finite point of each stretch: spikes and gaps survive, in order."""
    if len(points) <= 3 * buckets:
        return list(points)
    kept: set[int] = {0, len(points) - 1}
    for b in range(buckets):
        stretch = range(b * len(points) // buckets, (b + 1) * len(points) // buckets)
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept |= set([i for i in stretch if not math.isfinite(points[i][1])][:1])
    return [points[i] for i in sorted(kept)]


# -- parts of a drawing -------------------------------------------------------------------------------------------


def _finite(panel: Panel) -> list[float]:
    return [y for s in panel.series for _, y in s.points if math.isfinite(y)]


def _is_log(ys: list[float], zero: bool) -> bool:
    return not zero and min(ys, default=0.0) > 0 and max(ys) / min(ys) >= LOG_RATIO


def _newest(series: Series, several: bool) -> Html:
    """The last finite value in the line's colour; a line that the page's key does not explain is named here."""
    finite = [y for _, y in series.points if math.isfinite(y)]
    name = f"{series.name} " if several and not series.keyed else ""
    return tag("span", name, number(finite[-1], 3) if finite else "", cls=series.style, title=series.name or None)


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 1, high + 1)


def _vertical(ys: list[float], zero: bool, frame: Frame) -> Axis:
    low, high = min(ys), max(ys)
    start, end = frame.floor, TOP
    if _is_log(ys, zero):
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    if zero:
        return Axis(min(low, 0.0), high * 1.05 if high > 0 else 1.0, start, end)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - pad, high + pad, start, end)


def _grid(x: Axis, y: Axis, frame: Frame, x_name: str) -> Html:
    parts = []
    levels = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 5)
    for level, label in zip(levels, _labels(levels), strict=True):
        parts += [_line(LEFT, y(level), frame.right, y(level), "grid"), _text(LEFT - 6, y(level) + 3.5, label, "end")]
    places = [at for at in ticks(x.low, x.high, 5) if at == int(at)]
    floor = frame.floor
    for at, label in zip(places, _labels(places), strict=True):
        parts += [_line(x(at), floor, x(at), floor + 3, "axis"), _text(x(at), floor + 14, label)]
    parts.append(_line(LEFT, floor, frame.right, floor, "axis"))
    parts.append(_text(frame.right, frame.height - 3, x_name, "end"))
    return join(parts)


def _labels(levels: list[float]) -> list[str]:
    """Equal decimals on one axis; thousands as k and M; powers of ten for what is tiny."""
    top = max((abs(v) for v in levels), default=0.0)
    if 0 < top < 1e-2:
        return ["0" if abs(v) < top * 1e-9 else number(v, 3) for v in levels]
    unit, suffix = next(((u, s) for u, s in ((1e6, "M"), (1e3, "k")) if top >= 10 * u), (1.0, ""))
    scaled = [v / unit for v in levels]
    decimals = next((d for d in range(9) if all(abs(v - round(v, d)) < 1e-9 * max(abs(v), 1e-9) for v in scaled)), 9)
    even = all(abs(b - a - scaled[1] + scaled[0]) < 1e-6 * abs(b) for a, b in zip(scaled, scaled[1:], strict=False))
    return [(f"{v:,.{decimals}f}" if even else number(v)) + (suffix if v else "") for v in scaled]


def _mark(x: Axis, at: float, word: str, frame: Frame) -> Html:
    place = max(x(at), LEFT)
    late = place > frame.right - 60
    line = _line(place, TOP - 10, place, frame.floor, "stage") if at > x.low else Html("")
    return join([line, _text(place + (-3 if late else 3), TOP - 4, word, "end" if late else "start")])


def _curve(series: Series, x: Axis, y: Axis) -> Html:
    """The line, broken where values are not finite; dots where points are few; a cross at the top for every break."""
    path, pen, dots, crosses = [], "M", [], []
    finite = [(a, b) for a, b in series.points if math.isfinite(b)]
    for a, b in thin(series.points):
        if math.isfinite(b):
            path.append(f"{pen}{_px(x(a))} {_px(y(b))}" + ("h0" if pen == "M" else ""))  # h0: a dot even when alone
            pen = "L"
        else:
            crosses.append(f"M{_px(x(a) - 2.5)} {TOP - 2.5}l5 5m-5 0l5 -5")
            pen = "M"
    for a, b in finite if len(finite) <= 12 else finite[-1:]:
        dots.append(tag("circle", cx=_px(x(a)), cy=_px(y(b)), r=2.1, cls="dot"))
    parts = [tag("path", d="".join(path), cls="curve"), *dots]
    parts += [tag("path", d="".join(crosses), cls="broken")] if crosses else []
    return tag("g", *parts, cls=series.style)


def _words(panel: Panel) -> str:
    """What the drawing shows, for those who cannot see it."""
    said = []
    for s in panel.series:
        finite = [y for _, y in s.points if math.isfinite(y)]
        broken = len(s.points) - len(finite)
        text = f"from {number(finite[0])} to {number(finite[-1])}" if finite else "no finite value"
        said.append(f"{s.name} {text}".strip() + (f", {broken} not finite" if broken else ""))
    return f"{panel.title} {panel.unit}".strip() + f" by {panel.x_name}: " + "; ".join(said)


def _line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Html:
    return tag("line", x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2), cls=cls)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Html:
    return tag("text", text, x=_px(x), y=_px(y), text_anchor=anchor)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
