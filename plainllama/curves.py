"""Loss curves as a picture: an SVG file, or characters for a terminal, without a plotting library.

Of each run there are a thin line of training losses, each point the mean of what falls into one
column of the picture, and a line with a mark at each evaluation.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import escape

from plainllama.settings import fits

Axis = Literal["tokens", "time"]
Points = list[tuple[float, float]]  # (tokens or seconds, nats per token)

WIDTH, HEIGHT = 700, 320  # of the picture
LEFT, RIGHT, TOP, BOTTOM = 56, 684, 14, 276  # of the part inside the axes
# Okabe and Ito's colours, which can be told apart with any eyes; then grey for all others.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#bbbbbb"
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"
UNITS = {
    "tokens": ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")),
    "time": ((7200, "hours"), (120, "minutes")),
}


class Curve(NamedTuple):
    """The losses of a run, by tokens or seconds."""

    name: str
    trained: Points
    evaluated: Points
    note: str = ""  # what is said of the last evaluation

    @property
    def line(self) -> Points:
        """What stands for the run where there is room for one line."""
        return self.evaluated if len(self.evaluated) > 1 else self.trained or self.evaluated


def curve_of(name: str, records: Iterable[dict[str, Any]], axis: Axis = "tokens") -> Curve:
    """Return the curve of a run's metrics.jsonl; an evaluation has the time of the report before.

    Records without the numbers, and numbers that are not finite, are left out.
    """
    trained, evaluated, note, seconds = [], [], "", 0.0
    for record in records:
        if fits(record.get("seconds"), float):
            seconds = record["seconds"]
        x = seconds if axis == "time" else record.get("tokens")
        if fits(x, float) and fits(record.get("loss"), float):
            trained.append((float(x), record["loss"]))
        if fits(x, float) and fits(record.get("val_loss"), float):
            evaluated.append((float(x), record["val_loss"]))
            note = f"{record['val_loss']:.3f} nats per token"
            if fits(record.get("val_bpb"), float):
                note += f", {record['val_bpb']:.3f} bits per byte"
    return Curve(name, trained, evaluated, note)


def ticks(least: float, most: float, count: int) -> list[float]:
    """Return about `count` round numbers from `least` to `most`."""
    rough = (most - least) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(least / step), math.floor(most / step) + 1)]


class Scale(NamedTuple):
    """How numbers become places in a picture: `least` lies at `start`, `most` at `end`."""

    least: float
    most: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = (value - self.least) / (self.most - self.least)
        return self.start + part * (self.end - self.start)


def scales(curves: Sequence[Curve], left: int, right: int, top: int, bottom: int) -> list[Scale]:
    """Return the scales of both axes, that all points of the curves fit into."""
    points = [point for curve in curves for point in (*curve.trained, *curve.evaluated)]
    xs, ys = zip(*points, strict=True) if points else ((0, 1), (0, 1))
    low, high = min(ys), max(ys)
    room = 0.05 * (high - low) or 0.5
    x = Scale(0.0, max(xs) or 1.0, left, right)
    return [x, Scale(low - room, high + room, bottom, top)]


def unit(axis: Axis, most: float) -> tuple[float, str]:
    """Return the unit of the horizontal axis, as a number of tokens or seconds, and its name."""
    small = (1.0, "tokens" if axis == "tokens" else "seconds")
    return next((pair for pair in UNITS[axis] if most >= pair[0]), small)


def thinned(points: Points, x: Scale) -> Points:
    """Return one point a column of the picture: the mean of those that fall into it."""
    means = []
    for _, group in groupby(points, key=lambda point: int(x(point[0]))):
        xs, ys = zip(*group, strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return means


def svg(curves: Sequence[Curve], axis: Axis = "tokens") -> str:
    """Return an SVG picture of curves, the first of which come first in the legend."""
    x, y = scales(curves, LEFT, RIGHT, TOP, BOTTOM)
    size, of_x = unit(axis, x.most)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for tick in ticks(0, x.most / size, 8):
        place = x(tick * size)
        parts.append(f'<path d="M{place:.1f} {BOTTOM}v4" stroke="#000000"/>')
        parts.append(text(place, BOTTOM + 18, f"{tick:g}", "x", "middle"))
    for tick in ticks(y.least, y.most, 5):
        place = y(tick)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{RIGHT}" stroke="#e6e6e6"/>')
        parts.append(text(LEFT - 8, place + 4, f"{tick:g}", "y", "end"))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#000000"/>')
    parts.append(text((LEFT + RIGHT) / 2, HEIGHT - 8, of_x, "label", "middle"))
    turned = f'transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)"'
    parts.append(f"<g {turned}>{text(0, 0, 'loss (nats per token)', 'label', 'middle')}</g>")
    alone = len(curves) == 1
    for number, curve in reversed([*enumerate(curves)]):  # the first on top
        colour = COLOURS[number] if number < len(COLOURS) else GREY
        parts.append(line(curve.name, "training", thinned(curve.trained, x), x, y, colour))
        colour = COLOURS[1] if alone else colour
        parts.append(line(curve.name, "validation", curve.evaluated, x, y, colour))
    notes = [f"{curve.name}: {curve.note}" if curve.note else curve.name for curve in curves]
    if alone:
        notes = ["training", f"validation: {curves[0].note}"]
    legend = [*zip(COLOURS, notes, strict=False)]
    if len(notes) > len(COLOURS):
        legend.append((GREY, f"{len(notes) - len(COLOURS)} more"))
    for row, (colour, said) in enumerate(legend):
        place = TOP + 12 + 17 * row
        parts.append(text(RIGHT - 24, place, said, "legend", "end"))
        parts.append(f'<path d="M{RIGHT - 18} {place - 4}h18" stroke="{colour}" stroke-width="2"/>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
    return "\n".join([start + 'font-size="12">', *parts, "</svg>\n"])


def line(run: str, kind: str, points: Points, x: Scale, y: Scale, colour: str) -> str:
    """Return the line through points; one of evaluations has a dot at each."""
    places = [f"{x(a):.2f},{y(b):.2f}" for a, b in points]
    what = f'data-run="{escaped(run)}" data-kind="{kind}" fill="none" stroke="{colour}"'
    title = f"<title>{escaped(run)}, {kind}</title>"
    if kind == "training":
        return f'<polyline {what} opacity="0.5" points="{" ".join(places)}">{title}</polyline>'
    dots = "".join(f"M{place}h0" for place in places)
    return (
        f'<polyline {what} stroke-width="2" points="{" ".join(places)}">{title}</polyline>'
        f'<path d="{dots}" stroke="{colour}" stroke-width="6" stroke-linecap="round"/>'
    )


def text(x: float, y: float, said: str, kind: str, anchor: str) -> str:
    """Return a text element at a place."""
    place = f'x="{x:.2f}" y="{y:.2f}" class="{kind}" text-anchor="{anchor}"'
    return f"<text {place}>{escaped(said)}</text>"


def escaped(said: str) -> str:
    """Return a text as XML may hold it."""
    sound = "".join(c if c.isprintable() else "\ufffd" for c in said)
    return escape(sound, {'"': "&quot;"})


def characters(curves: Sequence[Curve], axis: Axis, columns: int, rows: int = 18) -> str:
    """Return a picture of curves for a terminal: a letter for each run, named below."""
    curves = [curve for curve in curves[: len(SYMBOLS)] if curve.line]
    if not curves:
        return "nothing to draw yet"
    lines = [curve._replace(trained=curve.line, evaluated=[]) for curve in curves]
    columns = max(20, columns - 9)
    x, y = scales(lines, 0, columns - 1, 0, rows - 1)
    grid = [[" "] * columns for _ in range(rows)]
    for symbol, curve in reversed([*zip(SYMBOLS, lines, strict=False)]):
        points = [(x(a), y(b)) for a, b in thinned(curve.trained, x)]
        for (a, c), (b, d) in zip(points, points[1:] or points, strict=False):
            for column in range(round(a), round(b) + 1):
                part = (column - a) / (b - a) if b > a else 0.0
                grid[round(c + min(1.0, max(0.0, part)) * (d - c))][column] = symbol
    labels = {round(y(tick)): f"{tick:g}" for tick in ticks(y.least, y.most, 6)}
    shown = [f"{labels.get(row, ''):>7} |{''.join(cells)}" for row, cells in enumerate(grid)]
    size, of_x = unit(axis, x.most)
    end = f"{x.most / size:.4g} {of_x}"
    shown += [" " * 8 + "+" + "-" * columns, " " * 9 + "0" + end.rjust(columns - 1)]
    shown += [f"  {s}  {curve.name}" for s, curve in zip(SYMBOLS, curves, strict=False)]
    return "\n".join(line.rstrip() for line in shown)


def save(picture: Path, curves: Sequence[Curve], axis: Axis = "tokens") -> None:
    """Write an SVG picture of curves."""
    picture.write_text(svg(curves, axis), encoding="utf-8")
