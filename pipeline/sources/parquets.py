"""Parquet files: a row an image, whose bytes the file holds or whose URI it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.parquet_rows import opened
from pipeline.rows import to_table
from pipeline.s3 import StorageOptions
from pipeline.sources.files import File
from pipeline.sources.kinds import NoRowsError, Wanted, key_column, missing, unreadable, uri_column
from pipeline.sources.tables import ROWS_PER_TABLE, keys, located, numbered, table, text

# Columns that are carried along may hold long texts.
ROWS_PER_CARRYING_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which columns of a file mean what; of ``image`` and ``uri`` one is given."""

    image: str | None
    has_path: bool  # beside the bytes
    uri: str | None
    key: str | None
    columns: tuple[str, ...]

    @property
    def leaves(self) -> list[str]:
        """What has to be read for the inventory: never the images."""
        paths = [f"{self.image}.path"] if self.has_path else []
        return list(dict.fromkeys([*paths, *filter(None, (self.uri, self.key)), *self.columns]))


def tables(file: File, wanted: Wanted, storage: StorageOptions) -> Iterator[pa.Table]:
    """The file's rows; damage ends them by a failed row that stands for the rest."""
    first = 0
    try:
        with opened(file.location, storage) as parquet:
            layout = _layout(parquet.schema_arrow, wanted, file)
            for batch in _batches(parquet, layout):
                yield _rows(batch, first, layout, file)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if s3.is_outage(error):
            raise
        rest = f" from row {first} on" if first else ""
        yield to_table([unreadable(file, f"not a readable parquet file{rest} ({type(error).__name__})")])


def _batches(parquet: Any, layout: _Layout) -> Iterator[Any]:
    if layout.leaves:
        size = ROWS_PER_CARRYING_BATCH if layout.columns else ROWS_PER_TABLE
        yield from parquet.iter_batches(size, columns=layout.leaves)
        return
    total = parquet.metadata.num_rows
    for start in range(0, total, ROWS_PER_TABLE):
        yield pa.table({"": pa.nulls(min(ROWS_PER_TABLE, total - start))}).to_batches()[0]


def _rows(batch: Any, first: int, layout: _Layout, file: File) -> pa.Table:
    default = numbered(file, first, batch.num_rows)
    key = keys(batch.column(layout.key), default) if layout.key else default
    carried = {name: batch.column(name) for name in layout.columns}
    if layout.uri:
        places, errors = located(text(batch.column(layout.uri)), file.folder)
        return table(key=key, path=places, file=places, error=errors, carried=carried)
    path = default
    if layout.has_path:
        own = text(pc.struct_field(batch.column(layout.image), "path"))
        own = pc.if_else(pc.equal(own, ""), None, own)
        path = pc.coalesce(pc.binary_join_element_wise(file.name, own, "#"), default)
    rows = pa.array(range(first, first + batch.num_rows), pa.int64())
    location = pa.scalar(file.location.encode("utf-8", "surrogateescape"), pa.binary())
    return table(
        key=key,
        path=path,
        file=pa.repeat(location, batch.num_rows),
        offset=rows,
        column=layout.image or "",
        carried=carried,
    )


def _layout(schema: pa.Schema, wanted: Wanted, file: File) -> _Layout:
    texts = [field.name for field in schema if _is_text(field.type)]
    image = None if wanted.uri_column else _image_column(schema, wanted.image_column, file)
    uri = None if image else uri_column(texts, wanted, file)
    if not image and not uri:
        raise NoRowsError("no column of images or URIs")
    for name in wanted.columns:
        if name not in schema.names:
            raise missing("--keep-columns", name, file, schema.names)
        if name == image:
            raise ConfigurationError(f"--keep-columns {name}: it holds the images; keep other columns")
    kind = schema.field(image).type if image else None
    has_path = kind is not None and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    return _Layout(image, has_path, uri, key_column(schema.names, wanted, file), wanted.columns)


def _image_column(schema: pa.Schema, wanted: str | None, file: File) -> str | None:
    columns = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in columns:
            raise ConfigurationError(
                f"--image-column {wanted}: {file.shown} has no such column of images; "
                f"it has {', '.join(columns) or 'none'}"
            )
        return wanted
    if "image" in columns or len(columns) <= 1:
        return "image" if "image" in columns else next(iter(columns), None)
    raise ConfigurationError(
        f"{file.shown} has several columns of images ({', '.join(columns)}); choose one by --image-column"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(member.name == "bytes" and _is_binary(member.type) for member in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
