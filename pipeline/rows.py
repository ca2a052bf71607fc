"""One row of an input: what is known of an image before its bytes are read.

Sources write rows, reading opens them, and whatever is carried along (columns of the input) travels beside
them in the inventory, never through the stages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.columns import Failure

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),  # as shown to people
        (
            "file",
            pa.binary(),
        ),  # as the file system spells it, UTF-8 or not; or an s3://, http:// or https:// URI
        ("offset", pa.int64()),  # bytes into a tar, rows into a parquet file
        ("size", pa.int64()),  # bytes, -1 for the whole file
        ("column", pa.string()),  # image column of a parquet file, else ""
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("retryable", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Item:
    """One row to be read: its key, the path shown to people, and where its bytes lie."""

    key: str
    path: str
    file: str
    offset: int = 0
    size: int = -1
    column: str = ""
    failure: Failure | None = None


def to_table(items: Iterable[Item]) -> pa.Table:
    """The items in Arrow, by ``SCHEMA``."""
    return pa.Table.from_pylist([_record(item) for item in items], schema=SCHEMA)


def to_items(table: pa.Table) -> Iterator[Item]:
    """The items of a table that has the columns of ``SCHEMA``, whatever else it has."""
    for row in table.select(SCHEMA.names).to_pylist():
        failure = Failure(row["stage"], row["error_type"], row["error"], row["retryable"])
        yield Item(
            key=row["key"],
            path=row["path"],
            file=os.fsdecode(row["file"]),
            offset=row["offset"],
            size=row["size"],
            column=row["column"],
            failure=failure if failure.error_type else None,
        )


def _record(item: Item) -> dict[str, Any]:
    failure = item.failure or Failure("", "", "", False)
    place = {name: getattr(item, name) for name in ("key", "path", "offset", "size", "column")}
    return place | {"file": os.fsencode(item.file)} | asdict(failure)
