"""The bytes of rows, wherever they lie: files, members of tars, rows of parquet files, S3, http(s).

Neighbours that lie elsewhere are fetched together, ``MAX_IN_FLIGHT`` at most, and handed on in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from hired.errors import ConfigurationError, HiredError, ImageTooLargeError, UnreadableImageError
from pipeline import s3
from pipeline.columns import Failure
from pipeline.fetching import Fetcher, FetchOptions
from pipeline.parquet_rows import ImageCursor, image_cursor
from pipeline.rows import Item
from pipeline.s3 import StorageOptions

STAGE = "read"
MAX_IN_FLIGHT = 16


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How large a file may be, and how storage and servers are reached."""

    max_file_bytes: int = 128 * 2**20
    storage: StorageOptions = field(default_factory=StorageOptions)
    http: FetchOptions = field(default_factory=FetchOptions)


def read(items: Sequence[Item], options: ReadOptions) -> Iterator[bytes | Failure]:
    """The bytes of each item in order, or why it has none: a row that cannot be read fails alone."""
    for column, run in groupby(items, key=attrgetter("column")):
        if column:
            for file, rows in groupby(run, key=attrgetter("file")):
                yield from _parquet_images(file, column, list(rows), options)
        else:
            yield from _images(run, options)


def _images(items: Iterator[Item], options: ReadOptions) -> Iterator[bytes | Failure]:
    """Local files in their turn, remote ones ahead of it."""
    waiting: deque[Item | Future[bytes | Failure]] = deque()
    try:
        for item in items:
            is_remote = item.failure is None and _is_remote(item.file)
            waiting.append(_pool().submit(_image, item, options) if is_remote else item)
            if len(waiting) >= MAX_IN_FLIGHT:
                yield _result(waiting.popleft(), options)
        while waiting:
            yield _result(waiting.popleft(), options)
    finally:
        for each in waiting:  # of a caller that wants no more
            if isinstance(each, Future):
                each.cancel()


def _result(waiting: Item | Future[bytes | Failure], options: ReadOptions) -> bytes | Failure:
    return waiting.result() if isinstance(waiting, Future) else _image(waiting, options)


def _is_remote(file: str) -> bool:
    return file.lower().startswith(("s3://", "http://", "https://"))


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="read")


def _image(item: Item, options: ReadOptions) -> bytes | Failure:
    if item.failure:
        return item.failure
    try:
        match item.file.partition("://")[0].lower():
            case "s3":
                return _object(item, options)
            case "http" | "https":
                return _fetcher(replace(options.http, max_bytes=options.max_file_bytes)).get(item.file)
            case "file":
                path = os.fsdecode(unquote_to_bytes(item.file[len("file://") :]))
                return _file(replace(item, file=path), options)
            case _:
                return _file(item, options)
    except ConfigurationError:
        raise
    except (OSError, HiredError) as error:
        return Failure.of(error, STAGE)


@lru_cache(maxsize=2)
def _fetcher(options: FetchOptions) -> Fetcher:
    return Fetcher(options)


def _file(item: Item, options: ReadOptions) -> bytes:
    with open(item.file, "rb") as file:
        size = os.fstat(file.fileno()).st_size if item.size < 0 else item.size
        _check_size(size, options)
        file.seek(item.offset)
        data = file.read(size)
    _check_length(data, size)
    return data


def _object(item: Item, options: ReadOptions) -> bytes:
    """A whole object, or the member of a tar by its range."""
    _check_size(item.size, options)
    try:
        data = s3.get(
            item.file, options.storage, start=item.offset, size=item.size, limit=options.max_file_bytes
        )
    except OverflowError as error:
        raise _too_large(int(error.args[0]), options) from error
    except EOFError:
        data = b""
    _check_length(data, item.size)
    return data


def _check_length(data: bytes, size: int) -> None:
    if len(data) < size:
        raise UnreadableImageError(f"the file ends after {len(data)} of {size} bytes")


def _check_size(size: int, options: ReadOptions) -> None:
    if size > options.max_file_bytes:
        raise _too_large(size, options)


def _too_large(size: int, options: ReadOptions) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{size} bytes; the limit is {options.max_file_bytes}, raise it by --max-file-bytes"
    )


def _parquet_images(
    file: str, column: str, items: Sequence[Item], options: ReadOptions
) -> Iterator[bytes | Failure]:
    """The images of some rows of a parquet file; damage ends a row group, not the others."""
    with image_cursor(file, column, options.storage) as cursor:
        for item in items:
            yield item.failure or _parquet_image(cursor, item.offset, options)


def _parquet_image(cursor: ImageCursor, row: int, options: ReadOptions) -> bytes | Failure:
    try:
        value = cursor.value(row)
        if value is None:
            raise UnreadableImageError("the row has no image bytes")
        _check_size(len(value), options)
    except (pa.ArrowException, OSError, HiredError) as error:
        return Failure.of(error, STAGE)
    return value
