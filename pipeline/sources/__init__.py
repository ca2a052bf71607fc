"""What there is to caption: tables of rows, made from names, headers and footers before the work starts.

No image is read (but for ``sha256``), so that an input of any size is listed in bounded memory: one table of
rows, and the names of one folder or the keys of one tar.

| input | rows | key |
|---|---|---|
| image files | one a file | the path below the input folder |
| ``.parquet`` of images | a row; ``struct<bytes, path>`` or binary | column ``key``, or ``file#row`` |
| ``.parquet`` of URIs, such as a manifest | a row; paths are relative to the file | the same |
| ``.jsonl``, ``.ndjson``, also ``.gz`` | a line, an object that names its image | the same |
| ``.tar`` (WebDataset) | a sample: members of one name up to its first dot | that name |

Columns of the input are carried along: those of a table, fields of JSON objects, and of a sample of a tar its
members ``json`` and ``txt`` as text, and the fields of its ``json``. ``json`` and ``txt`` come without being
asked for if the first input is a tar that has them.

In a folder, tables are inputs only if they hold images or have a column named ``uri``, ``url``, ``image_uri``
or ``image_url``: a ``captions.jsonl`` beside its images would double them. A table that is named itself may
also call its column ``image``, ``path``, ``file_name`` and the like, or as ``uri_column`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from hired.errors import ConfigurationError
from pipeline import reading
from pipeline.fetching import FetchOptions
from pipeline.rows import SCHEMA, Item, to_items, to_table
from pipeline.s3 import StorageOptions
from pipeline.sources import carrying, files, jsonl, parquets, tars
from pipeline.sources.files import IMAGE_SUFFIXES, File
from pipeline.sources.kinds import Kind, NoRowsError, Wanted
from pipeline.sources.tables import ROWS_PER_TABLE, digested, gathered
from pipeline.sources.tars import sample_key

__all__ = ["IMAGE_SUFFIXES", "ScanOptions", "sample_key", "scan"]

log = logging.getLogger(__name__)

KINDS: dict[str, Kind] = {
    ".parquet": parquets.tables,
    ".tar": tars.tables,
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), jsonl.tables),
}


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """Which columns hold what, what is carried along, and how the bytes are reached."""

    image_column: str | None = None
    uri_column: str | None = None
    key_column: str | None = None
    columns: tuple[str, ...] = ()
    key: Literal["path", "sha256"] = "path"
    dedup: Literal["none", "sha256"] = "none"
    storage: StorageOptions = field(default_factory=StorageOptions)
    http: FetchOptions = field(default_factory=FetchOptions)
    max_file_bytes: int = 128 * 2**20

    def __post_init__(self) -> None:
        if self.image_column and self.uri_column:
            raise ConfigurationError("--image-column and --uri-column exclude each other; give one")
        if taken := set(self.columns) & {*SCHEMA.names, "sha256", "index"}:
            raise ConfigurationError(
                f"--keep-columns {', '.join(sorted(taken))}: the rows have columns of that name already; "
                "rename the input's"
            )

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.image_column, self.uri_column, self.key_column, self.columns)


def scan(source: str, options: ScanOptions) -> Iterator[pa.Table]:
    """The rows of a folder, a glob or a file, local or in S3: at most 10,000 a table, always in one order.

    All tables have the columns of ``rows.SCHEMA``, those that are carried along, with the input's own types,
    and ``sha256`` of the bytes where it is asked for. Raises ConfigurationError for what cannot be an input.
    """
    scanned = _Scan(source, options)
    tables: Iterable[pa.Table] = scanned.tables()
    if "sha256" in (options.key, options.dedup):
        read = reading.ReadOptions(options.max_file_bytes, options.storage, options.http)
        tables = (
            digested(table, reading.read(list(to_items(table)), read), as_key=options.key == "sha256")
            for table in tables
        )
    yield from gathered(tables)
    scanned.check()


@dataclass(slots=True)
class _Scan:
    """One pass over an input, which counts what it sees."""

    source: str
    options: ScanOptions
    num_rows: int = 0
    num_ignored: int = 0
    ignored: list[str] = field(default_factory=list)

    def tables(self) -> Iterator[pa.Table]:
        carried = self._carried()
        loose: list[Item] = []
        for file in self._files():
            if file.suffix in IMAGE_SUFFIXES:
                loose.append(Item(file.name, file.shown, file.location))
            if len(loose) == ROWS_PER_TABLE or (loose and file.suffix not in IMAGE_SUFFIXES):
                yield self._counted(to_table(loose), carried, file)
                loose = []
            if file.suffix not in IMAGE_SUFFIXES:
                # What tars bring along by themselves was asked of no other file.
                columns = tuple(carried.names) if file.suffix == ".tar" else self.options.columns
                for table in self._rows(file, columns):
                    yield self._counted(table, carried, file)
        if loose:
            yield self._counted(to_table(loose), carried, file)

    def check(self) -> None:
        """Warn of what was ignored; raise ConfigurationError if there was nothing else."""
        some = ", ".join(self.ignored) + (", ..." if self.num_ignored > len(self.ignored) else "")
        ignored = f"{self.num_ignored} other files: {some}"
        if not self.num_rows:
            raise ConfigurationError(
                f"--input {self.source}: no images there"
                + (f", but {ignored}" if self.num_ignored else "")
                + f"; rows come from {', '.join(sorted(IMAGE_SUFFIXES))}, from .tar, from .parquet with a "
                "column of images or URIs, and from .jsonl"
            )
        if self.num_ignored:
            log.warning("ignoring %s", ignored)

    def _files(self) -> Iterator[File]:
        return files.find(self.source, self.options.storage)

    def _rows(self, file: File, columns: tuple[str, ...]) -> Iterator[pa.Table]:
        kind = KINDS.get(file.suffix)
        if kind is None:
            self._ignore(file.name)
            return
        try:
            yield from kind(file, self.options.wanted.carrying(columns), self.options.storage)
        except NoRowsError as error:
            self._ignore(f"{file.name} ({error})")

    def _ignore(self, name: str) -> None:
        self.num_ignored += 1
        if len(self.ignored) < 5:
            self.ignored.append(name)

    def _counted(self, table: pa.Table, carried: pa.Schema, file: File) -> pa.Table:
        self.num_rows += table.num_rows
        return carrying.aligned(table, carried, file.name)

    def _carried(self) -> pa.Schema:
        """Types of the columns to carry along: those of the first table that has each of them."""
        names, types = list(self.options.columns), dict[str, Any]()
        is_first = True
        for file in self._files():
            if not is_first and types.keys() >= set(names):
                break
            if file.suffix in IMAGE_SUFFIXES:
                is_first = False
                continue
            automatic = tars.MEMBERS if is_first and file.suffix == ".tar" else ()
            if not names and not automatic and file.suffix in KINDS:
                break
            table = self._first(file, (*names, *(name for name in automatic if name not in names)))
            if table is None:
                continue
            is_first = False
            names += [name for name in automatic if name not in names and carrying.holds(table, name)]
            carrying.learn(types, table, names)
        return carrying.schema(names, types, self.source)

    def _first(self, file: File, columns: tuple[str, ...]) -> pa.Table | None:
        if file.suffix not in KINDS:
            return None
        wanted = self.options.wanted.carrying(columns)
        try:
            return next(iter(KINDS[file.suffix](file, wanted, self.options.storage)), None)
        except NoRowsError:
            return None
