"""What a sink is given and what it is: the tables of a shard, and the protocol that every format follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from hired.errors import HiredError
from pipeline.columns import Failure
from pipeline.rows import SCHEMA, Item, to_items
from pipeline.storage import Store


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


# The columns of the input that a run keeps come after these.
CAPTIONS = _schema(
    index=pa.int64(),
    key=pa.string(),
    path=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
    model=pa.string(),
    policy=pa.string(),
    prompt=pa.string(),
    prompt_id=pa.string(),
    caption=pa.string(),
    finish_reason=pa.string(),
    prompt_tokens=pa.int32(),
    visual_tokens_full=pa.int32(),
    visual_tokens_kept=pa.int32(),
    completion_tokens=pa.int32(),
    run_id=pa.string(),
)
DEAD_LETTERS = _schema(
    index=pa.int64(),
    key=pa.string(),
    path=pa.string(),
    prompt_id=pa.string(),
    stage=pa.string(),
    error_type=pa.string(),
    error=pa.string(),
    retryable=pa.bool_(),
)

# Opens rows of the inventory: one result an item, in order, a few at a time.
Images: TypeAlias = Callable[[Sequence[Item]], Iterator[bytes | Failure]]


class SinkError(HiredError):
    """A shard cannot be written as it should be; the run ends, and goes on from there when started again."""

    retryable = True


@dataclass(frozen=True, slots=True)
class Shard:
    """The answers of neighbouring rows, which end in one file of every format.

    ``captions`` and ``dead_letters`` follow their schemas and are sorted by ``index``, the questions of a row
    in their order; ``rows`` is the inventory's part: ``rows.SCHEMA``, ``index``, and carried columns.
    """

    number: int
    captions: pa.Table
    dead_letters: pa.Table
    rows: pa.Table

    def items(self, indices: Sequence[int]) -> list[Item]:
        """The rows that have these numbers, in this order."""
        places = pc.index_in(pa.array(indices, pa.int64()), value_set=self.rows["index"].combine_chunks())
        if places.null_count:
            raise ValueError(f"shard {self.number} has answers to rows that it does not hold")
        return list(to_items(self.rows.select(SCHEMA.names).take(places)))

    @property
    def carried(self) -> list[str]:
        """The columns of the input that captions keep."""
        return [name for name in self.captions.column_names if name not in CAPTIONS.names]


class Sink(Protocol):
    """A format of the output. ``owns`` are the files and folders that it writes, and nothing else does."""

    @property
    def name(self) -> str: ...

    @property
    def needs_images(self) -> bool: ...

    @property
    def owns(self) -> tuple[str, ...]: ...

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        """Write the shard's files, with the same names and contents whenever it is repeated."""

    def finish(self, store: Store) -> None:
        """Write what needs all shards to be there. May be repeated too."""
