"""Where the lines and bars of a report's charts lie, in the pixels of their SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.manifest import Session
from pipeline.tally import BIN

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
NUM_STEPS, NUM_BARS = 120, 48


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis and what stands there."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axes:
    """The frame of a chart: both axes begin at 0 unless ``x_from`` says otherwise."""

    x_to: float
    y_to: float
    x_from: float = 0.0

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_from) / (self.x_to - self.x_from) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - value / self.y_to * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def x_ticks(self) -> list[Tick]:
        return [Tick(self.x(value), _label(value)) for value in _round_values(self.x_from, self.x_to)]

    @property
    def y_ticks(self) -> list[Tick]:
        return [Tick(self.y(value), _label(value)) for value in _round_values(0, self.y_to)]


@dataclass(frozen=True, slots=True)
class Steps:
    """A rate over time as an SVG path; ``breaks`` are the places where the run was ended and went on."""

    axes: Axes
    path: str
    breaks: list[float]
    unit: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars of two distributions over the same bins; ``bin`` is the bins' width in tokens."""

    axes: Axes
    before: list[Bar]
    after: list[Bar]
    bin: int
    rows: list[tuple[int, int, int]]


def throughput(sessions: Sequence[Session]) -> Steps | None:
    """Rows a second over the seconds that the run was at work, its sessions one after another."""
    total_s = sum(session.wall_s for session in sessions)
    shown = [session for session in sessions if session.progress and session.wall_s > 0]
    if not shown:
        return None
    edges: list[float] = []
    rates: list[list[float]] = []
    starts, start_s = [], 0.0
    for session in shown:
        steps = max(2, round(NUM_STEPS * session.wall_s / total_s))
        rates.append(_rates(session, steps))
        starts.append(start_s)
        edges.append(session.wall_s / steps)
        start_s += session.wall_s
    unit, seconds = _time_unit(start_s)
    axes = Axes(start_s / seconds, max(max(map(max, rates)), 1e-9) * 1.05)
    path = [f"M{axes.x(0)} {axes.y(0)}"]
    for start, width, values in zip(starts, edges, rates, strict=True):
        for step, rate in enumerate(values):
            path.append(f"V{axes.y(rate)}H{axes.x((start + (step + 1) * width) / seconds)}")
    path.append(f"V{axes.y(0)}Z")
    return Steps(axes, "".join(path), [axes.x(start / seconds) for start in starts[1:]], unit)


def _rates(session: Session, steps: int) -> list[float]:
    """Rows a second in each of so many equal parts of a session."""
    done = session.progress[-1][1]
    points = [(0.0, done - session.rows), *session.progress, (session.wall_s, done)]
    times, rows = np.array(points, dtype=np.float64).T
    edges = np.linspace(0, session.wall_s, steps + 1)
    rates = np.diff(np.interp(edges, times, rows)) / (session.wall_s / steps)
    return [float(rate) for rate in rates.clip(min=0)]


def histogram(before: Mapping[int, int], after: Mapping[int, int]) -> Histogram | None:
    """Tokens an image before and after dropping, from counts by the start of their bin."""
    if not before and not after:
        return None
    starts = [*before, *after]
    bins = max(1, math.ceil((max(starts) + BIN) / BIN / NUM_BARS))
    width = bins * BIN
    one, other = _rebinned(before, width), _rebinned(after, width)
    axes = Axes(max(starts) // width * width + width, max([*one.values(), *other.values()]) * 1.05)
    rows = [(start, one.get(start, 0), other.get(start, 0)) for start in sorted({*one, *other})]
    return Histogram(axes, _bars(axes, one, width), _bars(axes, other, width), width, rows)


def _rebinned(counts: Mapping[int, int], width: int) -> dict[int, int]:
    wider: dict[int, int] = {}
    for start, count in counts.items():
        wider[start // width * width] = wider.get(start // width * width, 0) + count
    return wider


def _bars(axes: Axes, counts: Mapping[int, int], width: int) -> list[Bar]:
    return [
        Bar(
            x=axes.x(start),
            y=axes.y(count),
            width=round(axes.x(start + width) - axes.x(start) - 1, 1),
            height=round(axes.y(0) - axes.y(count), 1),
        )
        for start, count in sorted(counts.items())
    ]


def _round_values(low: float, high: float) -> list[float]:
    """Four to nine round numbers between the two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 8)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(value: float) -> str:
    return f"{value:,.10g}"


def _time_unit(seconds: float) -> tuple[str, float]:
    """What a span is best told in, and its length."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
