"""What there is to caption: an inventory of rows, made from names, headers and footers before the job starts.

The driver lists every row once, with its key and where its bytes lie, and reads no image. So duplicate keys
are found before any work is done, and the job can prove at its end that no row was lost. The images are read
by ``ReadStage`` in the cluster's tasks.

| input | rows | key |
|---|---|---|
| image files | one a file | the path below the input folder |
| ``.parquet`` | one a row; the image is ``struct<bytes, path>`` or binary | column ``key`` or ``file#row`` |
| ``.tar`` | one a sample (WebDataset: members of one name up to its first dot) | that name |
"""

from __future__ import annotations

import glob
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hired.errors import ConfigurationError, UnreadableImageError
from pipeline.columns import Batch, Failure, failures, printable

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# Blocks of the inventory are the units of reading: small enough to keep all workers busy, and to lose little.
ROWS_PER_BLOCK = 16

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("file", pa.binary()),  # as the file system spells it, UTF-8 or not
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


@dataclass(slots=True)
class Inventory:
    """All rows of an input, in blocks to be read together, and the files that hold none."""

    blocks: list[list[Item]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def items(self) -> Iterator[Item]:
        for block in self.blocks:
            yield from block

    def tables(self) -> list[pa.Table]:
        """One Arrow table a block."""
        return [
            pa.Table.from_pylist([_record(item) for item in block], schema=SCHEMA) for block in self.blocks
        ]


def take_inventory(source: str, image_column: str | None = None) -> Inventory:
    """Every row of a folder, a glob or a file; raises ConfigurationError for what cannot be an input."""
    inventory = Inventory()
    loose: list[Item] = []
    root, files = _files(source)
    for file in files:
        name = printable(os.path.relpath(file, root).replace(os.sep, "/"))
        match Path(file).suffix.lower():
            case ".parquet":
                rows = _parquet_blocks(file, name, image_column)
                inventory.blocks += rows
                if not rows:
                    inventory.ignored.append(f"{name} (no image column)")
            case ".tar":
                inventory.blocks += _blocks(_tar_items(file, name))
            case suffix if suffix in IMAGE_SUFFIXES:
                loose.append(Item(name, printable(file), file))
            case _:
                inventory.ignored.append(name)
    inventory.blocks += _blocks(loose)
    _check(inventory, source)
    return inventory


def _check(inventory: Inventory, source: str) -> None:
    seen: dict[str, str] = {}
    for item in inventory.items():
        if other := seen.get(item.key):
            raise ConfigurationError(
                f"two inputs have the key {item.key!r}: {other} and {item.path}; "
                "rename one, or caption them in two runs"
            )
        seen[item.key] = item.path
    ignored = f"{len(inventory.ignored)} other files: {', '.join(inventory.ignored[:5])}"
    if inventory.ignored:
        log.warning("ignoring %s%s", ignored, ", ..." if len(inventory.ignored) > 5 else "")
    if not seen:
        raise ConfigurationError(
            f"--input {source}: no images there"
            + (f", but {ignored}" if inventory.ignored else "")
            + f"; rows come from {', '.join(sorted(IMAGE_SUFFIXES))}, from .tar, "
            "and from .parquet with an image column"
        )


def _files(source: str) -> tuple[str, list[str]]:
    """The folder that keys are relative to, and all files, sorted; hidden ones are left out."""
    if os.path.isdir(source):
        return source, sorted(_walk(source))
    if _is_file(source):
        return os.path.dirname(source) or ".", [source]
    if not glob.has_magic(source):
        raise ConfigurationError(f"--input {source}: no such file or folder")
    parts = Path(source).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    found = glob.glob(source, recursive=True)
    inside = (file for path in found if os.path.isdir(path) for file in _walk(path))
    return str(Path(*parts[:fixed])), sorted({*filter(_is_file, found), *inside})


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from filter(
            _is_file, (os.path.join(parent, name) for name in names if not name.startswith("."))
        )


def _is_file(path: str) -> bool:
    """Whether this is a row to account for, as dangling links are; pipes and sockets block their readers."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _parquet_blocks(file: str, name: str, image_column: str | None) -> list[list[Item]]:
    """The rows, a block a row group, since a row group is read as a whole; none without an image column."""
    try:
        with pq.ParquetFile(file) as parquet:
            column = _image_column(parquet.schema_arrow, image_column, file)
            if column is None:
                return []
            labels = _labels(parquet, column, name)
            starts = [0]
            for group in range(parquet.num_row_groups):
                starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
    except (pa.ArrowException, OSError) as error:
        return [[_unreadable(file, name, f"not a readable parquet file ({type(error).__name__})")]]
    items = [Item(key, path, file, row, column=column) for row, (key, path) in enumerate(labels)]
    return [items[start:end] for start, end in pairwise(starts) if end > start]


def _image_column(schema: pa.Schema, wanted: str | None, file: str) -> str | None:
    columns = [column.name for column in schema if _holds_images(column.type)]
    if wanted is not None:
        if wanted not in columns:
            raise ConfigurationError(
                f"--image-column {wanted}: {file} has no such column of images; "
                f"it has {', '.join(columns) or 'none'}"
            )
        return wanted
    if "image" in columns or len(columns) <= 1:
        return "image" if "image" in columns else next(iter(columns), None)
    raise ConfigurationError(
        f"{file} has several columns of images ({', '.join(columns)}); choose one by --image-column"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(member.name == "bytes" and _is_binary(member.type) for member in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _labels(parquet: pq.ParquetFile, column: str, name: str) -> list[tuple[str, str]]:
    """Key and path of every row: the columns ``key`` and ``image.path``, or ``file#row``."""
    names = [f"{name}#{row}" for row in range(parquet.metadata.num_rows)]
    schema = parquet.schema_arrow
    kind = schema.field(column).type
    has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    wanted = (["key"] if "key" in schema.names else []) + ([f"{column}.path"] if has_path else [])
    table = parquet.read(columns=wanted) if wanted else None
    keys = table["key"].to_pylist() if table is not None and "key" in table.column_names else names
    images = table[column].to_pylist() if table is not None and has_path else names
    paths = [image.get("path") if isinstance(image, dict) else image for image in images]
    return [
        (str(default if key is None else key), f"{name}#{path}" if path and path != default else default)
        for key, path, default in zip(keys, paths, names, strict=True)
    ]


def _tar_items(file: str, name: str) -> Iterator[Item]:
    """One row a sample. What is after a broken header cannot be listed; one row stands for it."""
    without_image: dict[str, str] = {}
    with_image = set()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                path = f"{name}/{printable(member.name)}"
                key = sample_key(printable(member.name))
                if not member.isreg() or PurePosixPath(key).name == "":
                    continue
                if Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    with_image.add(key)
                    yield Item(key, path, file, member.offset_data, member.size)
                else:
                    without_image.setdefault(key, path)
            _check_end(tar)
    except (tarfile.TarError, OSError, ValueError) as error:
        yield _unreadable(file, name, f"not a readable tar from some point on ({type(error).__name__})")
    for key, path in without_image.items():
        if key not in with_image:
            failure = Failure.of(UnreadableImageError("the sample has no image"), "read")
            yield Item(key, path, file, failure=failure)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError where something else than the end follows: tarfile takes damage for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a broken header")


def sample_key(member: str) -> str:
    """The key of a member of a WebDataset tar: its path up to the first dot of its last part."""
    path = PurePosixPath(member)
    return str(path.with_name(path.name.split(".")[0])) if path.name.split(".")[0] else ""


def _unreadable(file: str, name: str, message: str) -> Item:
    return Item(name, printable(file), file, failure=Failure("read", "UnreadableFileError", message, False))


def _blocks(items: Iterable[Item]) -> list[list[Item]]:
    rows = list(items)
    return [rows[start : start + ROWS_PER_BLOCK] for start in range(0, len(rows), ROWS_PER_BLOCK)]


def _record(item: Item) -> dict[str, Any]:
    failure = item.failure or Failure("", "", "", False)
    place = {name: getattr(item, name) for name in ("key", "path", "offset", "size", "column")}
    return place | {"file": os.fsencode(item.file)} | asdict(failure)


def to_items(batch: Batch) -> list[Item]:
    """The rows of an inventory's block, as a stage gets them."""
    return [
        Item(str(key), str(path), os.fsdecode(file), int(offset), int(size), str(column), failure)
        for key, path, file, offset, size, column, failure in zip(
            *(batch[name] for name in ("key", "path", "file", "offset", "size", "column")),
            failures(batch),
            strict=True,
        )
    ]
