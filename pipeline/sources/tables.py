"""Rows column by column: the loops are Arrow's, since an input may have a billion of them."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import Failure, printable
from pipeline.rows import SCHEMA
from pipeline.sources.files import File

ROWS_PER_TABLE = 10_000
# Of text that is carried along.
BYTES_PER_TABLE = 32 * 2**20

ABSOLUTE = r"^(/|(s3|https?|file)://)"
FOREIGN = r"^([A-Za-z][A-Za-z0-9+.-]*://|data:)"
_DOTTED = re.compile(r"(^|/)\.\.?(/|$)")


def table(
    *,
    key: Any,
    path: Any,
    file: Any,
    offset: Any = 0,
    column: str = "",
    error: Any = "",
    carried: dict[str, Any] | None = None,
) -> pa.Table:
    """Rows of these columns, arrays or one value for all; ``error`` is "" in rows that can be read."""
    length = len(key)
    failed = pc.not_equal(_spread(error, pa.string(), length), "")
    values = {
        "key": key,
        "path": path,
        "file": file,
        "offset": offset,
        "size": -1,
        "column": column,
        "stage": pc.if_else(failed, "read", ""),
        "error_type": pc.if_else(failed, "UnreadableImageError", ""),
        "error": error,
        "retryable": False,
    }
    arrays = [_spread(values[field.name], field.type, length) for field in SCHEMA]
    carried = carried or {}
    return pa.Table.from_arrays([*arrays, *carried.values()], names=[*SCHEMA.names, *carried])


def _spread(value: Any, kind: pa.DataType, length: int) -> Any:
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.cast(kind)
    return pa.repeat(pa.scalar(value, kind), length)


def numbered(file: File, first: int, length: int) -> pa.Array:
    """``file#row`` of the rows from ``first`` on."""
    rows = pa.array(np.arange(first, first + length)).cast(pa.string())
    return pc.binary_join_element_wise(f"{file.name}#", rows, "")


def keys(values: Any, default: pa.Array) -> pa.Array:
    """The values as text, with the default where there is none."""
    return pc.coalesce(text(values), default)


def text(values: Any) -> pa.Array:
    """The values as valid UTF-8, whatever their type."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        strings = values.cast(pa.string())
        strings.validate(full=True)
    except pa.ArrowException:
        strings = pa.array([_text(value) for value in _stored(values).to_pylist()], pa.string())
    return strings


def _stored(values: Any) -> Any:
    """Text as its bytes, valid UTF-8 or not: Arrow gives out nothing else of what is not."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return values.cast(pa.large_binary()) if any(kind(values.type) for kind in kinds) else values


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else printable(str(value))


def located(uris: pa.Array, folder: str) -> tuple[pa.Array, pa.Array]:
    """Where the images lie, relative paths taken from the folder, and why not, "" for those that do."""
    folder = folder.rstrip("/")
    given = pc.fill_null(uris, "")
    absolute = pc.match_substring_regex(given, ABSOLUTE, ignore_case=True)
    foreign = pc.and_(pc.match_substring_regex(given, FOREIGN), pc.invert(absolute))
    below = pc.binary_join_element_wise(printable(folder), given, "/")
    places = pc.if_else(pc.or_(absolute, foreign), given, below)
    if folder.startswith("s3://") and pc.any(pc.match_substring_regex(given, _DOTTED.pattern)).as_py():
        places = pa.array([_without_dots(place) for place in places.to_pylist()], pa.string())
    errors = pc.if_else(foreign, "only s3://, http://, https://, file:// and paths are read", "")
    errors = pc.if_else(pc.equal(given, ""), "the row names no image", errors)
    return places, errors


def _without_dots(uri: str) -> str:
    """The object that a path with dots means: names of objects are no paths, and are not followed as such."""
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{posixpath.normpath(path)}" if scheme == "s3" and _DOTTED.search(path) else uri


def gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer tables, where many are small."""
    waiting: list[pa.Table] = []
    num_rows = num_bytes = 0
    for each in tables:
        if waiting and (num_rows + each.num_rows > ROWS_PER_TABLE or num_bytes > BYTES_PER_TABLE):
            yield pa.concat_tables(waiting)
            waiting, num_rows, num_bytes = [], 0, 0
        if each.num_rows:
            waiting.append(each)
            num_rows, num_bytes = num_rows + each.num_rows, num_bytes + each.nbytes
    if waiting:
        yield pa.concat_tables(waiting)


def digested(rows: pa.Table, images: Iterator[bytes | Failure], *, as_key: bool) -> pa.Table:
    """The rows with the column ``sha256``, null where bytes cannot be read; ``as_key`` those rows fail."""
    results = [image if isinstance(image, Failure) else hashlib.sha256(image).hexdigest() for image in images]
    digests = pa.array([None if isinstance(each, Failure) else each for each in results], pa.string())
    if as_key:
        rows = _replaced(rows, "key", pc.coalesce(digests, rows["key"]))
        rows = _failed(rows, [each if isinstance(each, Failure) else None for each in results])
    return rows.append_column("sha256", digests)


def _failed(rows: pa.Table, failures: Sequence[Failure | None]) -> pa.Table:
    for name in ("stage", "error_type", "error", "retryable"):
        values = [
            before if failure is None else getattr(failure, name)
            for before, failure in zip(rows[name].to_pylist(), failures, strict=True)
        ]
        rows = _replaced(rows, name, pa.array(values, rows.schema.field(name).type))
    return rows


def _replaced(rows: pa.Table, name: str, values: Any) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), rows.schema.field(name), values)
