"""Every row of a run, written down once before the work starts, so that a resumed run means the same rows.

Numbered parquet parts lie in ``_work/rows/``, and ``_work/inventory.json``, written last, says that all are
there. The source is not listed again: what is added to it later belongs to another run. Memory: one part,
and eight bytes a row while keys are compared (ten million rows, 80 MB).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from hired.errors import ConfigurationError
from pipeline.layout import Layout
from pipeline.storage import Store

INVENTORY = "_work/inventory.json"
ROWS_PER_PART = 50_000


@dataclass(frozen=True, slots=True)
class Contents:
    """What the inventory says of itself."""

    layout: Layout
    rows_per_part: int
    num_duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """The rows of a run, read part by part; may be sent to workers."""

    store: Store
    contents: Contents

    @property
    def layout(self) -> Layout:
        return self.contents.layout

    def rows(self, wanted: range) -> pa.Table:
        """The rows numbered so, with their ``index`` and the columns that they carry."""
        size = self.contents.rows_per_part
        parts = [
            self._part(number, wanted) for number in range(wanted.start // size, -(-wanted.stop // size))
        ]
        return pa.concat_tables(parts)

    def _part(self, number: int, wanted: range) -> pa.Table:
        start = number * self.contents.rows_per_part
        first, end = max(wanted.start - start, 0), wanted.stop - start
        with pq.ParquetFile(self.store.open(_part(number))) as part:
            length = part.metadata.row_group(0).num_rows  # of every row group but the last
            groups = range(first // length, min(-(-end // length), part.num_row_groups))
            return part.read_row_groups(list(groups)).slice(first - groups.start * length, end - first)

    def blocks(self, wanted: range, size: int) -> Iterator[pa.Table]:
        """The rows in tables of at most ``size``, a shard in memory at a time."""
        step = self.layout.rows_per_shard
        for start in range(wanted.start, wanted.stop, step):
            rows = self.rows(range(start, min(start + step, wanted.stop)))
            for first in range(0, rows.num_rows, size):
                yield rows.slice(first, size)


def find_inventory(store: Store) -> Inventory | None:
    """The inventory of a run that has one."""
    if not store.exists(INVENTORY):
        return None
    return Inventory(store, TypeAdapter(Contents).validate_json(store.read(INVENTORY)))


def take_inventory(
    store: Store,
    tables: Iterable[pa.Table],
    arrange: Callable[[int], Layout],
    *,
    dedup: bool = False,
    num_sampled: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Inventory:
    """Write down the rows of ``tables``, numbered; raises ConfigurationError for two rows of one key.

    ``dedup`` drops rows whose column ``sha256`` came before. ``num_sampled`` rows are drawn evenly at random,
    by ``seed``, in their order; ``limit`` takes the first.
    """
    counter = _Duplicates() if dedup else None
    rows: Iterable[pa.Table] = map(counter.without, tables) if counter else tables
    if limit is not None:
        rows = _first(rows, limit)
    if num_sampled is not None:
        rows = [_sampled(rows, num_sampled, seed)]
    hashes = []
    num_rows = number = 0
    for part in _parts(rows, ROWS_PER_PART):
        hashes.append(_hashes(part["key"].to_pylist()))
        index = pa.array(np.arange(num_rows, num_rows + part.num_rows))
        _write_part(store, number, part.add_column(0, "index", index))
        num_rows, number = num_rows + part.num_rows, number + 1
    if not num_rows:
        raise ConfigurationError("no rows are left: look at --limit and --sample")
    duplicates = counter.num_dropped if counter else 0
    inventory = Inventory(store, Contents(arrange(num_rows), ROWS_PER_PART, duplicates))
    check_keys(inventory, np.concatenate(hashes))
    store.write(INVENTORY, TypeAdapter(Contents).dump_json(inventory.contents, indent=2))
    return inventory


def check_keys(inventory: Inventory, hashes: NDArray[np.uint64]) -> None:
    """Raise ConfigurationError that names two rows of one key."""
    ordered = np.sort(hashes)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not twice:
        return
    seen: dict[str, str] = {}
    for block in inventory.blocks(range(inventory.layout.num_rows), ROWS_PER_PART):
        for key, path in zip(block["key"].to_pylist(), block["path"].to_pylist(), strict=True):
            if _hash(key) not in twice:
                continue
            if key in seen:
                raise ConfigurationError(
                    f"two rows have the key {key!r}: {seen[key]} and {path}; rename one, "
                    "say --key sha256, or drop copies by --dedup sha256"
                )
            seen[key] = path


def _part(number: int) -> str:
    return f"_work/rows/part-{number:06d}.parquet"


def _write_part(store: Store, number: int, rows: pa.Table) -> None:
    with store.writer(_part(number)) as file:
        pq.write_table(rows, file, row_group_size=5_000, compression="zstd")


def _parts(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``size``, the last one shorter."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(each.num_rows for each in waiting) >= size:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size)
            waiting = [whole.slice(size)]
    rest = pa.concat_tables(waiting) if waiting else None
    if rest is not None and rest.num_rows:
        yield rest


def _first(tables: Iterable[pa.Table], limit: int) -> Iterator[pa.Table]:
    for table in tables:
        yield table.slice(0, limit)
        limit -= table.num_rows
        if limit <= 0:
            return


def _sampled(tables: Iterable[pa.Table], count: int, seed: int) -> pa.Table:
    """``count`` rows drawn evenly from all, by one pass, in their order."""
    draw, seen = random.Random(seed), 0
    kept: list[tuple[int, pa.Table]] = []
    for table in tables:
        for row in range(table.num_rows):
            place = len(kept) if seen < count else draw.randint(0, seen)
            if place < count:
                kept[place : place + 1] = [(seen, table.take([row]))]
            seen += 1
    return pa.concat_tables([row for _, row in sorted(kept, key=lambda each: each[0])])


class _Duplicates:
    """Drops rows whose image came before."""

    def __init__(self) -> None:
        self.num_dropped = 0
        self._seen: set[str] = set()

    def without(self, table: pa.Table) -> pa.Table:
        keep = [self._is_new(digest) for digest in table["sha256"].to_pylist()]
        self.num_dropped += keep.count(False)
        return table.filter(pa.array(keep, pa.bool_()))

    def _is_new(self, digest: str | None) -> bool:
        """A row whose bytes could not be read has no digest, and is a copy of none."""
        if not digest:
            return True
        new = digest not in self._seen
        self._seen.add(digest)
        return new


def _hashes(keys: list[str]) -> NDArray[np.uint64]:
    return np.array([_hash(key) for key in keys], np.uint64)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
