"""Inputs of every kind, written on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config, from_tree

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def config(**options: Any) -> Config:
    return from_tree({"input": "in", "output": "out", **options})


def write_tar(file: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def write_parquet(
    file: Path, rows: Sequence[Mapping[str, Any]], *, group: int = 2, **types: pa.DataType
) -> Path:
    schema = pa.schema(list(types.items()))
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), file, row_group_size=group)
    return file


def write_lines(file: Path, *objects: Any) -> Path:
    """JSONL; bytes are written as they are."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in objects]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file
