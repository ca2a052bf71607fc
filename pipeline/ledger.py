"""What is done: a file a unit, a marker a shard. The driver alone writes here.

    _work/units/unit-00000007.arrow      answers and failures of all rows of a unit
    _work/units/retry-000002-01.arrow    those of the rows of shard 2 that were tried again, the first time
    _work/shards/000002.json             the shard is published: what it adds up to, and how often retried

A file appears whole or not at all, and is there or is not: that is the commit. A shard's marker is written
after its output files, and its unit files go after the marker, so every step can be done again after a kill.
Memory: a few hundred bytes a shard and a number a unit that waits for its shard (ten million rows in shards
of 5,000 are 2,000 markers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline.layout import Layout
from pipeline.storage import Store
from pipeline.tally import Record, Tally

UNITS, SHARDS = "_work/units", "_work/shards"
READERS = 16


class ShardRecord(Record):
    """A shard that is published; ``generation`` counts how often its dead letters were tried again."""

    shard: int
    generation: int = 0
    tally: Tally


class Ledger:
    """The state of a run's work, read once and kept up to date by its own commits."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store, self._layout = store, layout
        self._units: set[int] = set()
        self._retries: set[tuple[int, int]] = set()
        self._published: dict[int, tuple[int, int]] = {}  # generation, rows that may be tried again
        self._read()

    def _read(self) -> None:
        for record in self._records():
            self._note(record)
        for name in self._store.list(UNITS):
            kind, *numbers = name.rpartition("/")[2].removesuffix(".arrow").split("-")
            first, *rest = map(int, numbers)
            shard = self._layout.shard_of_unit(first) if kind == "unit" else first
            generation = rest[0] if rest else 0
            if generation < self.next_generation(shard):
                self._store.delete(name)  # a kill came between the marker and this
            elif kind == "unit":
                self._units.add(first)
            else:
                self._retries.add((shard, generation))

    def _records(self) -> Iterator[ShardRecord]:
        with ThreadPoolExecutor(READERS) as readers:
            for data in readers.map(self._store.read, self._store.list(SHARDS)):
                yield ShardRecord.model_validate_json(data)

    def _note(self, record: ShardRecord) -> None:
        self._published[record.shard] = (record.generation, record.tally.counts.retryable)

    def tally(self) -> Tally:
        """What all published shards add up to."""
        return sum((record.tally for record in self._records()), Tally())

    # What is left.

    def pending_units(self) -> list[range]:
        """The units to be done, neighbours together."""
        return _runs(
            unit
            for unit in range(self._layout.num_units)
            if unit not in self._units and self._layout.shard_of_unit(unit) not in self._published
        )

    def retryable_shards(self, generation: int) -> list[int]:
        """Published shards with rows to try again, that were retried less than ``generation`` times."""
        return sorted(
            shard
            for shard, (done, rows) in self._published.items()
            if rows and done < generation and (shard, done + 1) not in self._retries
        )

    def num_retryable(self, shards: Iterable[int]) -> int:
        """Dead letters of published shards that may succeed another time."""
        return sum(self._published[shard][1] for shard in shards)

    def publishable(self) -> list[int]:
        """Shards whose units are all there, and those whose second tries are."""
        return [shard for shard in range(self._layout.num_shards) if self.is_publishable(shard)]

    def is_publishable(self, shard: int) -> bool:
        if shard in self._published:
            return (shard, self.next_generation(shard)) in self._retries
        return all(unit in self._units for unit in self._layout.shard_units(shard))

    def is_complete(self) -> bool:
        return len(self._published) == self._layout.num_shards

    @property
    def num_committed(self) -> int:
        """Rows of committed units, published or not."""
        published = sum(len(self._layout.shard_rows(shard)) for shard in self._published)
        return published + sum(len(self._layout.unit_rows(unit)) for unit in self._units)

    @property
    def generation(self) -> int:
        """How often the most retried shard was."""
        return max((done for done, _ in self._published.values()), default=0)

    def next_generation(self, shard: int) -> int:
        """0 for a shard that is not published."""
        return self._published[shard][0] + 1 if shard in self._published else 0

    # Commits.

    def commit_unit(self, unit: int, rows: pa.Table) -> None:
        self._store.write(unit_file(unit), serialised(rows))
        self._units.add(unit)

    def commit_retry(self, shard: int, rows: pa.Table) -> None:
        generation = self.next_generation(shard)
        self._store.write(retry_file(shard, generation), serialised(rows))
        self._retries.add((shard, generation))

    def pieces(self, shard: int) -> list[str]:
        """The files that a shard is published from."""
        if shard in self._published:
            return [retry_file(shard, self.next_generation(shard))]
        return [unit_file(unit) for unit in self._layout.shard_units(shard)]

    def commit_shard(self, record: ShardRecord) -> None:
        """Mark the shard as published, and let its pieces go."""
        pieces = self.pieces(record.shard)
        self._store.write(shard_file(record.shard), record.model_dump_json().encode())
        self._note(record)
        self._store.delete(*pieces)
        self._units.difference_update(self._layout.shard_units(record.shard))
        self._retries.discard((record.shard, record.generation))

    def record(self, shard: int) -> ShardRecord | None:
        if shard not in self._published:
            return None
        return ShardRecord.model_validate_json(self._store.read(shard_file(shard)))


def unit_file(unit: int) -> str:
    return f"{UNITS}/unit-{unit:08d}.arrow"


def retry_file(shard: int, generation: int) -> str:
    return f"{UNITS}/retry-{shard:06d}-{generation:02d}.arrow"


def shard_file(shard: int) -> str:
    return f"{SHARDS}/{shard:06d}.json"


def serialised(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, rows.schema, options=options) as writer:
        writer.write_table(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def deserialised(data: bytes) -> pa.Table:
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        return reader.read_all()


def _runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges."""
    return list(_ranges(numbers))


def _ranges(numbers: Iterable[int]) -> Iterator[range]:
    run = None
    for number in numbers:
        if run is not None and number == run.stop:
            run = range(run.start, number + 1)
            continue
        if run is not None:
            yield run
        run = range(number, number + 1)
    if run is not None:
        yield run
