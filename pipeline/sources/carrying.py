"""Columns of the input that travel beside the rows: one type each, whatever files they come from."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from hired.errors import ConfigurationError
from pipeline.rows import SCHEMA


def holds(table: pa.Table, name: str) -> bool:
    """Whether the table has a value in this column."""
    return name in table.column_names and table[name].null_count < table.num_rows


def learn(types: dict[str, pa.DataType], table: pa.Table, names: Sequence[str]) -> None:
    """Note the type of each column that this table is the first to have."""
    for name in names:
        if name in table.column_names and name not in types:
            kind = table.schema.field(name).type
            types[name] = pa.string() if pa.types.is_null(kind) else kind


def schema(names: Sequence[str], types: dict[str, pa.DataType], source: str) -> pa.Schema:
    """The columns carried along; raises ConfigurationError for one that no file has."""
    if absent := [name for name in names if name not in types]:
        raise ConfigurationError(
            f"--input {source}: nothing there has the column {', '.join(absent)}, "
            "which is to be kept or which a prompt names; look at its spelling"
        )
    return pa.schema([(name, types[name]) for name in names])


def aligned(table: pa.Table, carried: pa.Schema, file: str) -> pa.Table:
    """The table with exactly these columns after those of its rows; nulls where it has none."""
    columns = [table[name] for name in SCHEMA.names]
    columns += [_column(table, field, file) for field in carried]
    return pa.Table.from_arrays(columns, schema=pa.unify_schemas([SCHEMA, carried]))


def _column(table: pa.Table, field: pa.Field, file: str) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    column = table[field.name]
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise ConfigurationError(
            f"{file}: its column {field.name} is {column.type} and cannot become {field.type}, "
            "which it is in the files before; make the types equal, or caption them in two runs"
        ) from error
