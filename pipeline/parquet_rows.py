"""Rows of a parquet file by their number, read page by page: not even one row group has to fit into memory.

Parquet has no way to a row but through those before it in its row group. So the reader of the last rows is
kept, and whoever asks for the ones after them goes on where it stopped.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hired.errors import UnreadableImageError
from pipeline import s3
from pipeline.s3 import StorageOptions
from pipeline.storage import filesystem

ROWS_PER_BATCH = 4


@contextmanager
def opened(location: str, storage: StorageOptions) -> Iterator[Any]:
    """The parquet file, to be read in small pieces."""
    files, path = filesystem(location, storage)
    buffer_size = 8 * 2**20 if s3.is_s3(location) else 2**20
    with (
        files.open_input_file(path) as data,
        pq.ParquetFile(data, pre_buffer=False, buffer_size=buffer_size) as parquet,
    ):
        yield parquet


class ImageCursor:
    """The images of a parquet file's rows, cheap in ascending order."""

    def __init__(self, file: str, column: str, storage: StorageOptions) -> None:
        self.place = (file, column, storage)
        self._exit = ExitStack()
        self._parquet: Any = None
        self._starts: list[int] = []
        self._group, self._first, self._length = -1, 0, 0
        self._damage: dict[int, Exception] = {}

    def value(self, row: int) -> bytes | None:
        """The bytes in a row, None where it has none; raises OSError or ArrowException for a damaged file."""
        self._open()
        if not 0 <= row < self._starts[-1]:
            raise UnreadableImageError(f"the file has {self._starts[-1]} rows, no row {row}")
        group = bisect_right(self._starts, row) - 1
        if group in self._damage:
            raise self._damage[group]
        try:
            return self._value(group, row)
        except (pa.ArrowException, OSError) as error:
            self._group = -1
            if not s3.is_outage(error):
                self._damage[group] = error
            raise

    def close(self) -> None:
        self._exit.close()

    def _open(self) -> None:
        if self._parquet is not None:
            return
        file, column, storage = self.place
        parquet = self._exit.enter_context(opened(file, storage))
        if column not in parquet.schema_arrow.names:
            raise UnreadableImageError(f"the file has no column {column}")
        self._is_struct = pa.types.is_struct(parquet.schema_arrow.field(column).type)
        self._leaf = f"{column}.bytes" if self._is_struct else column
        lengths = (parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
        self._starts = list(accumulate(lengths, initial=0))
        self._parquet = parquet

    def _value(self, group: int, row: int) -> bytes | None:
        if group != self._group or row < self._first:
            self._batches = self._parquet.iter_batches(
                ROWS_PER_BATCH, row_groups=[group], columns=[self._leaf]
            )
            self._group, self._first, self._length = group, self._starts[group], 0
        while row >= self._first + self._length:
            self._first += self._length
            self._values = next(self._batches).column(0)
            self._length = len(self._values)
        value = self._values[row - self._first]
        image: bytes | None = (value["bytes"] if self._is_struct and value.is_valid else value).as_py()
        return image


class _Kept:
    """The cursor that was used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursor: ImageCursor | None = None

    def swap(self, cursor: ImageCursor | None) -> ImageCursor | None:
        with self._lock:
            before, self._cursor = self._cursor, cursor
        return before


_kept = _Kept()


@contextmanager
def image_cursor(file: str, column: str, storage: StorageOptions) -> Iterator[ImageCursor]:
    """A cursor of these images, for this thread alone; the last one, where it is of the same file."""
    cursor = _kept.swap(None)
    if cursor is None or cursor.place != (file, column, storage):
        if cursor is not None:
            cursor.close()
        cursor = ImageCursor(file, column, storage)
    try:
        yield cursor
    finally:
        if (other := _kept.swap(cursor)) is not None:
            other.close()
