"""JSONL: an object a line that names its image, and whose other fields may be carried along."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.columns import printable
from pipeline.rows import to_table
from pipeline.s3 import StorageOptions
from pipeline.sources.files import File
from pipeline.sources.kinds import NoRowsError, Wanted, key_column, unreadable, uri_column
from pipeline.sources.tables import BYTES_PER_TABLE, ROWS_PER_TABLE, keys, located, numbered, table
from pipeline.storage import filesystem

MAX_LINE_BYTES = 64 * 2**20
BUFFER_BYTES = 2**18
NOT_AN_OBJECT = "the line holds no JSON object"


@dataclass(slots=True)
class _Lines:
    """Some consecutive lines, parsed; None is one that holds no object."""

    first: int
    rows: list[dict[str, Any] | None] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= ROWS_PER_TABLE or self.num_bytes >= BYTES_PER_TABLE


def tables(file: File, wanted: Wanted, storage: StorageOptions) -> Iterator[pa.Table]:
    """The file's rows. Fields are found by the first object; a line that is none is a failed row."""
    names: tuple[str, str | None] | None = None
    end = 0
    try:
        files, path = filesystem(file.location, storage)
        with files.open_input_stream(path) as data:
            for lines in _parsed(data):
                if names is None:
                    names = _names(lines, wanted, file)
                yield _rows(lines, *names, wanted, file)
                end = lines.first + len(lines.rows)
    except (pa.ArrowException, OSError) as error:
        if s3.is_outage(error):
            raise
        rest = f" from line {end} on" if end else ""
        yield to_table([unreadable(file, f"not a readable text file{rest} ({type(error).__name__})")])


def _parsed(data: Any) -> Iterator[_Lines]:
    """All lines; at damage, those before it come first."""
    lines = _Lines(0)
    try:
        for line in _lines(data):
            lines.rows.append(_parsed_line(line))
            lines.num_bytes += len(line)
            if lines.is_full:
                yield lines
                lines = _Lines(lines.first + len(lines.rows))
    except (pa.ArrowException, OSError):
        if lines.rows:
            yield lines
        raise
    if lines.rows:
        yield lines


def _lines(data: Any) -> Iterator[bytes]:
    reader: IO[bytes] = io.BufferedReader(data, BUFFER_BYTES)
    while line := reader.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise OSError("a line without an end")
        yield line


def _parsed_line(line: bytes) -> dict[str, Any] | None:
    """The object; an empty one for a blank line."""
    if not line.strip():
        return {}
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) and parsed else None


def _names(lines: _Lines, wanted: Wanted, file: File) -> tuple[str, str | None]:
    """The fields of the URI and of the key, by the first object."""
    example = next(filter(None, lines.rows), None)
    if example is None:
        raise NoRowsError("no JSON objects")
    texts = [name for name, value in example.items() if isinstance(value, str)]
    uri = uri_column(texts, wanted, file)
    if uri is None:
        raise NoRowsError("no field of URIs")
    return uri, key_column(list(example), wanted, file)


def _rows(lines: _Lines, uri: str, key: str | None, wanted: Wanted, file: File) -> pa.Table:
    kept = [number for number, row in enumerate(lines.rows) if row != {}]
    objects = [lines.rows[number] or {} for number in kept]
    default = numbered(file, lines.first, len(lines.rows)).take(pa.array(kept, pa.int64()))
    uris = [row.get(uri) for row in objects]
    places, errors = located(pa.array([_text(each) for each in uris], pa.string()), file.folder)
    broken = pa.array([lines.rows[number] is None for number in kept], pa.bool_())
    return table(
        key=keys(pa.array([_key(row, key) for row in objects], pa.string()), default),
        path=pc.if_else(pc.equal(errors, ""), places, default),
        file=places,
        error=pc.if_else(broken, NOT_AN_OBJECT, errors),
        carried={name: column([row.get(name) for row in objects], name, file) for name in wanted.columns},
    )


def _key(row: dict[str, Any], name: str | None) -> str | None:
    value = row.get(name) if name else None
    return None if value is None else printable(value if isinstance(value, str) else json.dumps(value))


def _text(value: Any) -> str | None:
    return printable(value) if isinstance(value, str) else None


def column(values: Sequence[Any], name: str, file: File) -> pa.Array:
    """Values of JSON as Arrow understands them; raises ConfigurationError for a mixture of types."""
    try:
        return pa.array([printable(value) if isinstance(value, str) else value for value in values])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ConfigurationError(
            f"{file.shown}: the values of {name} are of several types ({error}); make them one, "
            "or do not keep that column"
        ) from error
