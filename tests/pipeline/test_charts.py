"""What a chart shows has the place and the area that it should have."""

from __future__ import annotations

import re

import pytest

from pipeline import charts
from pipeline.tally import BIN
from tests.pipeline.finished_runs import session


def corners(steps: charts.Steps) -> list[tuple[float, float]]:
    """The path's right ends of steps, in seconds and rows a second."""
    axes = steps.axes
    width = charts.WIDTH - charts.LEFT - charts.RIGHT
    height = charts.HEIGHT - charts.TOP - charts.BOTTOM
    found = re.findall(r"V([\d.]+)H([\d.]+)", steps.path)
    return [
        (
            (float(x) - charts.LEFT) / width * axes.x_to,
            (charts.HEIGHT - charts.BOTTOM - float(y)) / height * axes.y_to,
        )
        for y, x in found
    ]


def rows_below(steps: charts.Steps, seconds: float = 1.0) -> float:
    """The area under the rate, in rows."""
    total, before = 0.0, 0.0
    for time, rate in corners(steps):
        total += (time - before) * seconds * rate
        before = time
    return total


def test_the_area_under_the_rate_is_the_number_of_rows() -> None:
    steps = charts.throughput([session(600, 100.0)])
    assert steps is not None
    assert steps.unit == "seconds"
    assert rows_below(steps) == pytest.approx(600, rel=0.05)
    assert corners(steps)[0][1] == 0  # loading
    assert not steps.breaks


def test_sessions_follow_each_other_and_each_counts_its_own_rows() -> None:
    steps = charts.throughput([session(600, 1000.0), session(300, 500.0, before=600)])
    assert steps is not None
    assert steps.unit == "minutes"
    assert rows_below(steps, 60.0) == pytest.approx(900, rel=0.05)
    [place] = steps.breaks
    assert place == pytest.approx(charts.LEFT + 2 / 3 * (charts.WIDTH - charts.LEFT - charts.RIGHT), abs=0.2)


def test_sessions_without_progress_are_left_out() -> None:
    nothing = session(0, 5.0).model_copy(update={"progress": []})
    assert charts.throughput([nothing]) is None
    assert charts.throughput([]) is None
    idle = session(0, 5.0).model_copy(update={"progress": [(1.0, 0)]})
    assert charts.throughput([idle]) is not None


def test_bars_are_as_high_as_their_counts_and_stand_at_their_bins() -> None:
    chart = charts.histogram({960: 97}, {128: 40, 192: 57})
    assert chart is not None
    assert chart.bin == BIN
    assert [bar.height / chart.before[0].height for bar in chart.after] == pytest.approx(
        [40 / 97, 57 / 97], rel=0.01
    )
    assert chart.after[1].x == chart.axes.x(192)
    assert chart.before[0].x + chart.before[0].width < charts.WIDTH - charts.RIGHT
    assert chart.rows == [(128, 0, 40), (192, 0, 57), (960, 97, 0)]


def test_many_bins_become_few_and_lose_nothing() -> None:
    before = {BIN * number: number + 1 for number in range(500)}
    chart = charts.histogram(before, {0: 7})
    assert chart is not None
    assert len(chart.before) <= charts.NUM_BARS
    assert chart.bin % BIN == 0
    assert sum(count for _, count, _ in chart.rows) == sum(before.values())


def test_nothing_to_count_is_no_chart() -> None:
    assert charts.histogram({}, {}) is None


@pytest.mark.parametrize("high", [0.003, 0.9, 1, 7.7, 63, 2300, 1e7])
def test_ticks_are_few_and_inside(high: float) -> None:
    axes = charts.Axes(high, high)
    assert 3 <= len(axes.x_ticks) <= 10
    assert all(charts.LEFT <= tick.at <= charts.WIDTH - charts.RIGHT for tick in axes.x_ticks)
    assert len({tick.label for tick in axes.y_ticks}) == len(axes.y_ticks)
