"""The driver's loop: answers come in, complete pieces are committed, complete shards are published.

One thread commits. Publishing reads and writes much and runs beside it, and its result is committed here too.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import metrics
from pipeline.ledger import Ledger, ShardRecord
from pipeline.progress import Progress, UnitTotals
from pipeline.publishing import AccountingError, Publisher
from pipeline.work import Gatherer, Work

log = logging.getLogger(__name__)

Stream = Callable[[Work, "Stop"], Iterator[pa.Table]]
Publish = Callable[[Publisher, int, list[str], ShardRecord | None], ShardRecord]
PUBLISHERS = 2


class Stop:
    """Whether the run was asked to end; ``on_stop`` callbacks then run, once each."""

    def __init__(self) -> None:
        self.requested = False
        self._callbacks: list[Callable[[], object]] = []

    def on_stop(self, callback: Callable[[], object]) -> None:
        self._callbacks.append(callback)
        if self.requested:
            callback()

    def request(self) -> None:
        self.requested = True
        for callback in self._callbacks:
            callback()


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGTERM, or one Ctrl-C, asks the run to finish what is on its way; a second Ctrl-C interrupts it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("finishing what is on its way; the same command will go on from there")
        threading.Thread(target=stop.request, daemon=True).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Driver:
    """Commits what a pass brings."""

    def __init__(self, ledger: Ledger, publisher: Publisher, publish: Publish, progress: Progress) -> None:
        self._ledger, self._publisher, self._publish = ledger, publisher, publish
        self._progress = progress
        self._executor = ThreadPoolExecutor(PUBLISHERS, thread_name_prefix="publish")
        self._publishing: dict[Future[ShardRecord], int] = {}

    def publish_what_is_complete(self) -> None:
        """What a run before left committed but not published."""
        for shard in self._ledger.publishable():
            self._start(shard)
        self._wait()

    def run(self, work: Work, answers: Iterable[pa.Table], committed: Callable[[int], object]) -> int:
        """The pieces of a pass that were committed; ``committed`` is told each one."""
        gatherer, count = Gatherer(work), 0
        for table in answers:
            for piece, rows in gatherer.add(table):
                started_s = time.perf_counter()
                work.commit(self._ledger, piece, rows)
                committed(piece)
                count += 1
                unit = totals(rows, len(work.questionnaire))
                self._progress.committed(unit)
                metrics.committed(unit, time.perf_counter() - started_s)
                shard = work.shard_of(piece)
                if self._ledger.is_publishable(shard):
                    self._start(shard)
            metrics.in_flight(gatherer.num_missing)
            self._commit_published()
        self._wait()
        return count

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _start(self, shard: int) -> None:
        pieces, before = self._ledger.pieces(shard), self._ledger.record(shard)
        future = self._executor.submit(self._publish, self._publisher, shard, pieces, before)
        self._publishing[future] = shard

    def _commit_published(self) -> None:
        for future in [each for each in self._publishing if each.done()]:
            del self._publishing[future]
            self._ledger.commit_shard(future.result())

    def _wait(self) -> None:
        while self._publishing:
            wait(self._publishing, return_when=FIRST_COMPLETED)
            self._commit_published()


def here(publisher: Publisher, shard: int, pieces: list[str], before: ShardRecord | None) -> ShardRecord:
    """Publish in this process."""
    return publisher.publish(shard, pieces, before)


def check_complete(ledger: Ledger) -> None:
    """Raise AccountingError for rows that never came back."""
    if not ledger.is_complete():
        left = ledger.pending_units()
        raise AccountingError(
            f"{sum(map(len, left))} units of rows never came back, the first of them {left[:1]}; "
            "the same command tries them again"
        )


def totals(answers: pa.Table, num_questions: int) -> UnitTotals:
    """What a unit's answers add up to, for the display."""
    failed = pc.not_equal(answers["error_type"], "")
    dead, captions = answers.filter(failed), answers.filter(pc.invert(failed))
    kinds = zip(dead["stage"].to_pylist(), dead["error_type"].to_pylist(), strict=True)
    failures: Mapping[str, int] = Counter(f"{stage}: {error_type}" for stage, error_type in kinds)
    sums: dict[str, Any] = {
        name: pc.sum(captions[column]).as_py() or 0
        for name, column in (
            ("visual_full", "visual_tokens_full"),
            ("visual_kept", "visual_tokens_kept"),
            ("completion_tokens", "completion_tokens"),
        )
    }
    return UnitTotals(
        rows=answers.num_rows // num_questions, captions=captions.num_rows, failures=failures, **sums
    )
