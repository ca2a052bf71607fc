"""How far a run is: one display on stderr for people, or a line every half minute where nobody watches.

[=======>      ] 4,200/10,000 42%  0:12:34
12.3 images/s (mean 11.0)  tokens kept 586 of 2,928 an image (20.0 %)  3 failed: partition: ... 2
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
# Commits come in bursts: the recent rate looks back over a minute, or so many units if they take longer.
RECENT_S, RECENT_UNITS = 60.0, 8
MAX_POINTS = 500
NUM_KINDS = 3


@dataclass(frozen=True, slots=True)
class UnitTotals:
    """What one committed unit holds. ``rows`` counts input rows, the others its answers.

    ``failures`` is keyed by stage and error type, such as ``read: OSError``; tokens are those of captions.
    """

    rows: int
    captions: int
    failures: Mapping[str, int]
    visual_full: int
    visual_kept: int
    completion_tokens: int


class Progress:
    """The display of a run of ``total`` rows, ``done`` of which earlier sessions committed.

    A context manager; ``committed`` may be called from any thread. Rows of earlier sessions are on the bar
    and in no rate. ``status`` can be set at any time.
    Writes to ``stream`` (stderr) if it is a terminal, else to the log, and never to stdout.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self.total, self.done, self.status = total, done, ""
        self._stream = stream or sys.stderr
        self._clock, self._line_every_s = clock, line_every_s
        self._pools, self._bottleneck = "", ""
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._captions = self._visual_full = self._visual_kept = 0
        self._started_s = clock()
        self._series = _Series()
        self._recent: deque[tuple[float, int]] = deque()
        self._rows = 0  # of this session
        self._display: _Terminal | _Lines | None = None

    def __enter__(self) -> Progress:
        self._started_s = self._clock()
        drawn = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        display = _Terminal(self, self._stream) if drawn else _Lines(self, self._line_every_s)
        display.start()
        self._display = display
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def settled(self, workers: Mapping[str, int], bottleneck: str = "") -> None:
        """Shows how many workers there are at most, and the slowest stage if it is known."""
        self._pools = ", ".join(f"{name} {count}" for name, count in workers.items())
        self._bottleneck = bottleneck

    def again(self, rows: int) -> None:
        """So many rows that were done are done once more."""
        self.total += rows

    def committed(self, unit: UnitTotals) -> None:
        """Counts a unit that is safely in the output."""
        with self._lock:
            now = self._elapsed_s
            self._rows += unit.rows
            self.done += unit.rows
            self._captions += unit.captions
            self._visual_full += unit.visual_full
            self._visual_kept += unit.visual_kept
            self._failures.update(unit.failures)
            self._series.add(now, self._rows)
            self._recent.append((now, self._rows))
            while len(self._recent) > RECENT_UNITS + 1 and self._recent[1][0] < now - RECENT_S:
                self._recent.popleft()

    @property
    def series(self) -> list[tuple[float, int]]:
        """Seconds since the start, and the rows of this session committed by then; at most 500 points."""
        with self._lock:
            return self._series.points

    @property
    def mean_rate(self) -> float:
        """Rows a second since the start."""
        return self._rows / max(self._elapsed_s, 1e-9)

    @property
    def recent_rate(self) -> float:
        """Rows a second over the last minute or so, without start-up; it falls while nothing is committed."""
        with self._lock:
            if len(self._recent) < 3:
                return self.mean_rate
            then_s, rows = self._recent[0]
            return (self._rows - rows) / max(self._elapsed_s - then_s, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Seconds until all rows are done; None as long as none has been."""
        rate = self.recent_rate or self.mean_rate
        return max(0, self.total - self.done) / rate if rate else None

    def line(self) -> str:
        """All of it in one line."""
        eta = self.eta_s
        share = f" ({self.done / self.total:.1%})" if self.total else ""
        left = f"{timedelta(seconds=round(eta))} left" if eta is not None else "waiting for the first rows"
        parts = [f"{self.done:,}/{self.total:,} rows{share}", left, *self.facts()]
        return ", ".join(parts)

    def facts(self) -> list[str]:
        """What is told besides rows and time."""
        facts = [f"{self.recent_rate:.2f} images/s (mean {self.mean_rate:.2f})"]
        with self._lock:
            if self._visual_full:
                full, kept = self._visual_full / self._captions, self._visual_kept / self._captions
                saved = 1 - kept / full
                facts.append(f"{kept:.0f} of {full:.0f} visual tokens kept, {saved:.1%} saved")
            if self._failures:
                kinds = "; ".join(f"{kind} {count}" for kind, count in self._failures.most_common(NUM_KINDS))
                more = "; ..." if len(self._failures) > NUM_KINDS else ""
                facts.append(f"{self._failures.total():,} failed ({kinds}{more})")
        if self._pools:
            facts.append(f"workers: {self._pools}")
        if self._bottleneck:
            facts.append(f"slowest: {self._bottleneck}")
        return [*facts, self.status] if self.status else facts

    @property
    def _elapsed_s(self) -> float:
        return self._clock() - self._started_s


class _Series:
    """Points over time: when there are too many, every second one goes, and from then on fewer are kept."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._stride, self._count = 1, 0
        self._last: tuple[float, int] | None = None

    def add(self, seconds: float, rows: int) -> None:
        self._last = (round(seconds, 3), rows)
        if self._count % self._stride == 0:
            self._points.append(self._last)
        self._count += 1
        if len(self._points) == MAX_POINTS:
            self._points = self._points[::2]
            self._stride *= 2

    @property
    def points(self) -> list[tuple[float, int]]:
        """With the newest as the last, whatever was thinned out."""
        rest = [self._last] if self._last is not None and self._points[-1:] != [self._last] else []
        return [*self._points, *rest]


class _Terminal:
    """A bar that is drawn over and over, with the facts below it."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self._progress = progress
        self._console = Console(file=stream)
        self._bar = Bar(
            TextColumn("captioning"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=progress.total, eta="")
        self._live = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=4)
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start(self) -> None:
        """From here on, log lines that go to stderr are printed above the bar instead of through it."""
        before = sys.stderr
        self._live.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._handlers.append((handler, before))
                handler.setStream(sys.stderr)

    def stop(self) -> None:
        self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()

    def _drawn(self) -> Group:
        progress = self._progress
        eta = progress.eta_s
        left = "waiting for the first rows" if eta is None else f"{timedelta(seconds=round(eta))} left"
        self._bar.update(self._task, completed=progress.done, total=progress.total, eta=left)
        return Group(self._bar.get_renderable(), Text("  ".join(progress.facts()), style="dim"))


class _Lines:
    """A log line now and then, and one at the end."""

    def __init__(self, progress: Progress, every_s: float) -> None:
        self._progress, self._every_s = progress, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        log.info("%s", self._progress.line())

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            log.info("%s", self._progress.line())
