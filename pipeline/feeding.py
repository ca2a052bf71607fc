"""How rows enter Ray Data: piece by piece, no faster than they are committed, until someone says stop.

The rows are read from the inventory inside the cluster, by one task at a time, so the driver never holds
them. ``Brake`` is a small actor beside the driver which that task asks before each piece: so the rows on
their way are bounded, whatever their images weigh, and a run can end at the boundary of a piece.

Ray Data hands on what a reading task yields when ``DataContext.target_max_block_size`` of it has come
together, not before. A reader that waits for its rows to be committed would wait for ever, so each block is
filled up to that size, which is made small.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.work import FED, UnitWork, Work, fed

# What Ray Data cuts blocks to: large enough for a few images, small enough to fill a block of text up to it.
BLOCK_BYTES = 2 * 2**20
# Blocks from here to half as much again are handed on as they are.
FILLED_BYTES = BLOCK_BYTES * 5 // 4
PADDED = FED.append(pa.field("padding", pa.binary()))
PIECES_PER_TASK = 4096
# Each question costs two processes a millisecond, and there is always more on its way than is done meanwhile.
POLL_S = 0.25


class Brake:
    """Counts the pieces on their way."""

    def __init__(self, max_pieces: int) -> None:
        self._max_pieces = max_pieces
        self._on_their_way: set[int] = set()
        self._stopped = False

    def may_feed(self, piece: int) -> bool | None:
        """True for a piece that may go on its way now, False for later, None for not at all."""
        if self._stopped:
            return None
        if piece not in self._on_their_way and len(self._on_their_way) >= self._max_pieces:
            return False
        self._on_their_way.add(piece)  # a task that is run again feeds its pieces again
        return True

    def committed(self, pieces: list[int]) -> None:
        self._on_their_way.difference_update(pieces)

    def stop(self) -> None:
        self._stopped = True


def start_brake(max_pieces: int) -> Any:
    """The actor, on this node; it dies with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Brake)
    return actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=4).remote(max_pieces)


class Feed(Datasource):  # type: ignore[misc]
    """The rows of a pass, as a source of Ray Data."""

    def __init__(self, work: Work, brake: Any, block_size: int, samples: frozenset[int]) -> None:
        self._works = list(_portions(work))
        self._brake, self._block_size, self._samples = brake, block_size, samples

    def get_name(self) -> str:
        return "Rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    @property
    def num_tasks(self) -> int:
        """One a portion of the pass."""
        return len(self._works)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """To be run one after the other."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._reader(work), metadata, schema=PADDED) for work in self._works]

    def _reader(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        brake, block_size, samples = self._brake, self._block_size, self._samples

        def blocks() -> Iterator[pa.Table]:
            any_row = False
            for piece in work.pieces():
                if not _granted(brake, piece):
                    break
                for block in fed(work, piece, block_size, samples):
                    any_row = True
                    yield padded(block.cast(FED))
            if not any_row:
                yield PADDED.empty_table()

        return blocks


def padded(block: pa.Table) -> pa.Table:
    """The block with as many bytes in its first row as make it one that is handed on at once."""
    filling = b"\0" * max(0, FILLED_BYTES - block.nbytes)
    padding = pa.array([filling, *[b""] * (block.num_rows - 1)], pa.binary())
    return block.append_column(PADDED.field("padding"), padding)


def _granted(brake: Any, piece: int) -> bool:
    """Whether the piece may go; waits until that is known."""
    while (answer := ray.get(brake.may_feed.remote(piece))) is False:
        time.sleep(POLL_S)
    return answer is True


def _portions(work: Work) -> Iterator[Work]:
    """The pass in portions of some thousand pieces: what a task does again if its node dies."""
    if not isinstance(work, UnitWork):
        yield work
        return
    for run in work.units:
        for start in range(0, len(run), PIECES_PER_TASK):
            yield replace(work, units=[run[start : start + PIECES_PER_TASK]])
