"""Charts as inline SVG that follow the page's colours, carry a title for every mark, and need no script.

A series has a colour and a shape, so that no colour is needed to tell two apart; every mark can be reached by the keyboard and
is read aloud by its title. Numbers in: plain floats in the units of the axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
_LABELLED = 10  # marks; with more, only those on the frontier are labelled, the others by their title
COLOURS = 8  # of the page's style, --c0 to --c7

_SHAPES = ("circle", "square", "diamond", "triangle", "cross", "down")


@dataclass(frozen=True)
class Mark:
    """A point of a scatter."""

    x: float
    y: float
    size: float  # area relative to the largest, 0 to 1
    label: str
    title: str
    series: int
    named: bool = True
    error: float | None = None  # half the length of its bar


@dataclass(frozen=True)
class Curve:
    """A line through points, labelled at its end."""

    points: Sequence[tuple[float, float]]
    label: str
    series: int


@dataclass(frozen=True)
class Axis:
    """A scale: linear, or logarithmic where values span more than a decade."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, positive: bool = False) -> Axis:
        """An axis with room for the values; positive: begins at zero, or is logarithmic."""
        low, high = min(values), max(values)
        if positive and low > 0 and high / low > 4:
            return cls(low / 1.15, high * 1.15, True, start, end)
        if positive:
            low = 0.0
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        return cls(low if positive else low - room, high + room, False, start, end)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-30)) for v in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most seven round values."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for parts in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**p for p in powers for m in parts if self.low <= m * 10.0**p <= self.high]
                if len(found) <= 7:
                    return found or [self.low, self.high]
            return found[:: math.ceil(len(found) / 7)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scatter(marks: Sequence[Mark], x: str, y: str, title: str, *, line: tuple[float, str] | None = None) -> str:
    """Marks on two axes; x logarithmic where it has to be. line: a level across, and what it is."""
    across = Axis.over([m.x for m in marks], _LEFT, WIDTH - _RIGHT, positive=True)
    levels = [m.y for m in marks] + ([line[0]] if line else [])
    up = Axis.over(levels, HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, up, x, y)]
    if line:
        at = up.at(line[0])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT + 4}" y="{at - 4:.1f}">{escape(line[1])}</text>')
    texts: list[tuple[float, float, str, int]] = []
    for m in sorted(marks, key=lambda m: -m.size):
        px, py, radius = across.at(m.x), up.at(m.y), 4 + 7 * math.sqrt(max(0.0, m.size))
        bar = ""
        if m.error:
            low, high = (min(max(up.at(m.y + s * m.error), _TOP), HEIGHT - _BOTTOM) for s in (-1, 1))
            bar = f'<line class="bar" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        parts.append(_mark(px, py, radius, m.series, m.title, bar))
        if m.named or len(marks) <= _LABELLED:
            texts.append((px, py, m.label, int(radius)))
    parts += _labels(texts)
    return _svg(parts, title)


def curves(lines: Sequence[Curve], x: str, y: str, title: str) -> str:
    """Lines from a common start; labels stand in the legend."""
    points = [p for line in lines for p in line.points]
    across = Axis.over([p[0] for p in points], _LEFT, WIDTH - _RIGHT)
    across = Axis(0.0, across.high, False, _LEFT, WIDTH - _RIGHT)
    up = Axis.over([p[1] for p in points], HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, up, x, y)]
    for line in lines:
        path = " ".join(f"{across.at(a):.1f},{up.at(b):.1f}" for a, b in line.points)
        dash = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 3"')[(line.series // COLOURS) % 3]
        ends = " to ".join(f"{b:.4g}" for b in (line.points[0][1], line.points[-1][1]))
        shown = f"{line.label}: {ends} at {line.points[-1][0]:.4g}"
        px, py = across.at(line.points[-1][0]), up.at(line.points[-1][1])
        parts.append(f'<polyline class="line s{line.series % COLOURS}" points="{path}"{dash}/>')
        parts.append(_mark(px, py, 5, line.series, shown))
    return _svg(parts, title)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], float]], unit: str, title: str) -> str:
    """Stacked bars of parts, one a row, each with a tick for what was measured. rows: (label, (part, value)s, measured)."""
    height, left = 26, 150
    widest = max(max(sum(v for _, v in parts), measured) for _, parts, measured in rows)
    across = Axis(0.0, widest * 1.06, False, left, WIDTH - _RIGHT)
    bottom = len(rows) * height + 8
    out = [f'<line class="axis" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for tick in across.ticks():
        out.append(f'<line class="grid" x1="{across.at(tick):.1f}" x2="{across.at(tick):.1f}" y1="4" y2="{bottom}"/>')
        out.append(f'<text x="{across.at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    out.append(f'<text class="soft" x="{WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">{escape(unit)}</text>')
    for k, (label, parts, measured) in enumerate(rows):
        y = k * height + 8
        told = ", ".join(f"{name} {value:.4g}" for name, value in parts if value >= 0.005 * widest)
        planned = sum(v for _, v in parts)
        words = (
            f"{label}: planned {planned:.4g} ({told}), measured {measured:.4g}"
            if parts
            else f"{label}: measured {measured:.4g}"
        )
        row = [f'<g tabindex="0" role="img" aria-label="{escape(words)}"><title>{escape(words)}</title>']
        row.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(_cut(label, 22))}</text>')
        at = 0.0
        for index, (_, value) in enumerate(parts):
            x, end = across.at(at), across.at(at + value)
            if end - x > 0.2:
                row.append(f'<rect class="p{index}" x="{x:.1f}" y="{y}" width="{end - x:.1f}" height="{height - 8}"/>')
            at += value
        x = across.at(measured)
        row.append(f'<path class="measured" d="M{x:.1f} {y - 3}v{height - 2}"/></g>')
        out.append("".join(row))
    return _svg(out, title, bottom + 40)


def swatch(series: int) -> str:
    """The mark of a series by itself, for a legend."""
    body = f'<path class="mark s{series % COLOURS}" d="{_path(8, 8, 5, _SHAPES[series % len(_SHAPES)])}"/>'
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{body}</svg>'


def _svg(parts: Sequence[str], title: str, height: int = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def _frame(across: Axis, up: Axis, x: str, y: str) -> str:
    base = HEIGHT - _BOTTOM
    parts = []
    for tick in up.ticks():
        at = up.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in across.ticks():
        parts.append(f'<line class="grid" x1="{across.at(tick):.1f}" x2="{across.at(tick):.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text x="{across.at(tick):.1f}" y="{base + 16}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="soft" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>'
    )
    middle = (_TOP + base) / 2
    parts.append(
        f'<text class="soft" transform="rotate(-90 13 {middle})" x="13" y="{middle}" text-anchor="middle">{escape(y)}</text>'
    )
    return "".join(parts)


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _mark(x: float, y: float, radius: float, series: int, title: str, before: str = "") -> str:
    shape = _path(x, y, radius, _SHAPES[series % len(_SHAPES)])
    words = escape(title)
    return (
        f'<g tabindex="0" role="img" aria-label="{words}"><title>{words}</title>{before}'
        f'<path class="mark s{series % COLOURS}" d="{shape}"/></g>'
    )


def _path(x: float, y: float, r: float, shape: str) -> str:
    if shape == "square":
        return f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z"
    if shape == "diamond":
        a = 1.3 * r
        return f"M{x:.1f} {y - a:.1f}l{a:.1f} {a:.1f}l{-a:.1f} {a:.1f}l{-a:.1f} {-a:.1f}z"
    if shape in ("triangle", "down"):
        up = -1 if shape == "triangle" else 1
        return f"M{x:.1f} {y + up * 1.2 * r:.1f}L{x + 1.1 * r:.1f} {y - up * r:.1f}H{x - 1.1 * r:.1f}z"
    if shape == "cross":
        a, b = r * 0.4, r * 1.1
        return (
            f"M{x - a:.1f} {y - b:.1f}h{2 * a:.1f}v{b - a:.1f}h{b - a:.1f}v{2 * a:.1f}h{a - b:.1f}v{b - a:.1f}h{-2 * a:.1f}"
            f"v{a - b:.1f}h{a - b:.1f}v{-2 * a:.1f}h{b - a:.1f}z"
        )
    return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"


def _labels(texts: Sequence[tuple[float, float, str, int]]) -> list[str]:
    """Labels beside their marks, moved up or down where they would cover one another."""
    placed: list[tuple[float, float, float]] = []
    parts = []
    for x, y, label, radius in sorted(texts, key=lambda t: t[1]):
        width = 6.4 * len(label)
        left = x + radius + 3 if x + radius + 3 + width < WIDTH else x - radius - 3 - width
        left = max(2.0, left)
        for shift in (0, 13, -13, 26, -26, 39, -39, 52, 65):
            at = min(max(y + 4 + shift, _TOP + 8), HEIGHT - _BOTTOM - 3)
            if all(abs(at - b) > 12 or left > a + w or a > left + width for a, b, w in placed):
                break
        placed.append((left, at, width))
        parts.append(f'<text class="label" x="{left:.1f}" y="{at:.1f}" aria-hidden="true">{escape(label)}</text>')
    return parts


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
