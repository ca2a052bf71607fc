"""One display, never on stdout: a bar on terminals, lines in logs, and rates that mean this session."""

from __future__ import annotations

import io
import logging
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.progress import MAX_POINTS, Progress, UnitTotals


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """Takes what is written, and says that people watch."""

    def isatty(self) -> bool:
        return True


def unit(rows: int = 100, **failures: int) -> UnitTotals:
    return UnitTotals(rows, rows - sum(failures.values()), failures, 2000 * rows, 400 * rows, 30 * rows)


def test_rows_of_earlier_sessions_are_done_but_in_no_rate() -> None:
    clock = Clock()
    progress = Progress(10_000, 4_000, clock=clock)
    assert progress.eta_s is None
    for _ in range(10):
        clock.now_s += 10
        progress.committed(unit())
    assert progress.done == 5_000
    assert progress.mean_rate == pytest.approx(10)
    assert progress.eta_s == pytest.approx(500)


def test_the_recent_rate_forgets_start_up_and_slow_hours() -> None:
    clock = Clock()
    progress = Progress(100_000, clock=clock)
    clock.now_s += 300  # models load
    for _ in range(20):
        clock.now_s += 10
        progress.committed(unit())
    assert progress.mean_rate == pytest.approx(4)
    assert progress.recent_rate == pytest.approx(10)
    for _ in range(100):
        clock.now_s += 1
        progress.committed(unit())
    assert progress.recent_rate == pytest.approx(100)


def test_the_recent_rate_falls_while_nothing_is_committed() -> None:
    clock = Clock()
    progress = Progress(100_000, clock=clock)
    for _ in range(20):
        clock.now_s += 1
        progress.committed(unit())
    clock.now_s += 180
    assert progress.recent_rate < 12


def test_a_line_says_all_of_it() -> None:
    clock = Clock()
    progress = Progress(1_000, 200, clock=clock)
    progress.settled({"encode": 1, "generate": 2}, bottleneck="generate")
    clock.now_s += 10
    progress.committed(unit(100, **{"read: OSError": 3, "partition: ImageTooLargeError": 1}))
    progress.status = "ending"
    line = progress.line()
    for part in (
        "300/1,000 rows (30.0%)",
        "0:01:10 left",
        "10.00 images/s (mean 10.00)",
        "80.0% saved",
        "4 failed (read: OSError 3; partition: ImageTooLargeError 1)",
        "workers: encode 1, generate 2",
        "slowest: generate",
        "ending",
    ):
        assert part in line


def test_only_the_most_frequent_failures_are_named() -> None:
    progress = Progress(1_000)
    progress.committed(unit(100, **{f"read: Error{number}": number for number in range(1, 6)}))
    line = progress.line()
    assert "15 failed (read: Error5 5; read: Error4 4; read: Error3 3; ...)" in line
    assert "Error2" not in line


def test_where_nobody_watches_it_is_a_log_line_now_and_then(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "pipeline.progress")
    with Progress(100, stream=io.StringIO(), line_every_s=0.02) as progress:
        progress.committed(unit(50))
        time.sleep(0.2)
        progress.committed(unit(50))
    lines = [record.message for record in caplog.records]
    assert len(lines) > 2
    assert any("50/100" in line for line in lines)
    assert "100/100 rows (100.0%)" in lines[-1]
    assert capsys.readouterr().out == ""


def test_on_a_terminal_it_is_a_bar_and_stdout_stays_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    with Progress(200, stream=terminal) as progress:
        progress.committed(unit(100, **{"read: OSError": 2}))
        time.sleep(0.3)
    shown = terminal.getvalue()
    for part in ("100/200", "50%", "read: OSError 2", "80.0% saved", "left"):
        assert part in shown
    assert capsys.readouterr().out == ""


def test_a_terminal_that_cannot_draw_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with caplog.at_level(logging.INFO, "pipeline.progress"), Progress(10, stream=terminal) as progress:
        progress.committed(unit(10))
    assert terminal.getvalue() == ""
    assert "10/10" in caplog.text


def test_log_lines_do_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are printed by the bar's own console, and go where they went before when it is over."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Progress(10, stream=terminal):
            assert handler.stream is not terminal
            logging.getLogger("elsewhere").warning("a dead letter: b.jpg")
        assert handler.stream is terminal
        assert sys.stderr is terminal
    finally:
        root.removeHandler(handler)
    assert "a dead letter: b.jpg" in terminal.getvalue()


def test_an_error_ends_the_display_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    before = sys.stderr
    with pytest.raises(KeyboardInterrupt), Progress(10, stream=Terminal()):
        raise KeyboardInterrupt
    assert sys.stderr is before


def test_an_empty_run_has_a_display_too() -> None:
    assert Progress(0).line().startswith("0/0 rows")


@given(st.lists(st.integers(1, 100), max_size=3000))
def test_the_series_is_short_rising_and_ends_with_the_last_commit(rows: list[int]) -> None:
    clock = Clock()
    progress = Progress(10**9, clock=clock)
    for count in rows:
        clock.now_s += 1
        progress.committed(unit(count))
    series = progress.series
    assert len(series) <= MAX_POINTS
    assert series == sorted(set(series))
    assert (series[-1] if series else (0, 0)) == (len(rows), sum(rows))


def test_a_long_series_stays_evenly_spread() -> None:
    clock = Clock()
    progress = Progress(10**9, clock=clock)
    for _ in range(20_000):
        clock.now_s += 1
        progress.committed(unit(1))
    seconds = [point[0] for point in progress.series]
    gaps = [after - before for before, after in pairwise(seconds)]
    assert 200 <= len(seconds) <= MAX_POINTS
    assert max(gaps) <= 128
