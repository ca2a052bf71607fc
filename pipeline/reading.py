"""The bytes of an inventory's rows, read inside the cluster's tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter

import pyarrow as pa
import pyarrow.parquet as pq

from hired.errors import ImageTooLargeError, UnreadableImageError
from pipeline.columns import Batch, Failure, of_images
from pipeline.config import Config
from pipeline.costs import metered
from pipeline.sources import Item, to_items

# A call hands on its rows in parts, so that a block of large files is never in memory as a whole.
ROWS_PER_PART = 16
BYTES_PER_PART = 64 * 2**20
ROWS_PER_PARQUET_BATCH = 4


class ReadStage:
    """Rows of an inventory -> rows with their file's bytes; one that cannot be read fails alone."""

    name = "read"

    def __init__(self, config: Config) -> None:
        self._max_file_bytes = config.max_file_bytes

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """As many rows as came in, in parts."""
        images = self._images(to_items(batch))
        end = 0
        while end < len(batch["key"]):
            started_s = time.perf_counter()
            rows = list(_part(images))
            start, end = end, end + len(rows)
            part = {name: batch[name][start:end] for name in ("key", "path")}
            yield part | of_images(rows) | metered(self.name, len(rows), started_s)

    def _images(self, items: Sequence[Item]) -> Iterator[bytes | Failure]:
        for (file, column), run in groupby(items, key=attrgetter("file", "column")):
            if column:
                yield from self._parquet_images(file, column, [item.offset for item in run])
            else:
                yield from map(self._file_image, run)

    def _file_image(self, item: Item) -> bytes | Failure:
        if item.failure:
            return item.failure
        try:
            with open(item.file, "rb") as file:
                size = os.fstat(file.fileno()).st_size if item.size < 0 else item.size
                self._check_size(size)
                file.seek(item.offset)
                data = file.read(size)
            if len(data) < size:
                raise UnreadableImageError(f"the file ends after {len(data)} of {size} bytes")
        except (OSError, ImageTooLargeError, UnreadableImageError) as error:
            return Failure.of(error, self.name)
        return data

    def _parquet_images(self, file: str, column: str, rows: Sequence[int]) -> Iterator[bytes | Failure]:
        """The images of some rows of a parquet file, in order; damage ends the rows that lie after it too."""
        num_read = 0
        try:
            for value in _values(file, column, rows):
                num_read += 1
                yield self._parquet_image(value)
        except (pa.ArrowException, OSError) as error:
            damage = Failure.of(error, self.name)
            yield from [damage] * (len(rows) - num_read)

    def _parquet_image(self, value: bytes | None) -> bytes | Failure:
        try:
            if value is None:
                raise UnreadableImageError("the row has no image bytes")
            self._check_size(len(value))
        except (ImageTooLargeError, UnreadableImageError) as error:
            return Failure.of(error, self.name)
        return value

    def _check_size(self, size: int) -> None:
        if size > self._max_file_bytes:
            raise ImageTooLargeError(
                f"{size} bytes; the limit is {self._max_file_bytes}, raise it by --max-file-bytes"
            )


def _part(images: Iterator[bytes | Failure]) -> Iterator[bytes | Failure]:
    """The next images, as many as may be in memory at once."""
    num_bytes = 0
    for image in islice(images, ROWS_PER_PART):
        yield image
        num_bytes += 0 if isinstance(image, Failure) else len(image)
        if num_bytes >= BYTES_PER_PART:
            return


def _values(file: str, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
    """The bytes in some rows of a parquet file; only the row groups that hold them are read, page by page."""
    wanted, start = set(rows), 0
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
        is_struct = pa.types.is_struct(parquet.schema_arrow.field(column).type)
        leaf = f"{column}.bytes" if is_struct else column
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            if wanted.isdisjoint(range(start, end)):
                start = end
                continue
            for batch in parquet.iter_batches(ROWS_PER_PARQUET_BATCH, row_groups=[group], columns=[leaf]):
                for value in batch.column(0):
                    if start in wanted:
                        yield (value["bytes"] if is_struct and value.is_valid else value).as_py()
                    start += 1
