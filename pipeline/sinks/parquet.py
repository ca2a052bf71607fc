"""``captions/part-NNNNNN.parquet`` and ``dead_letters/part-NNNNNN.parquet``: what every run writes.

Row groups are small, so that one can be read without its file. With images a file loads as it is:
``datasets.load_dataset("parquet", data_files="OUTPUT/captions/*.parquet")`` gives a column of pictures.
An image that is asked several questions is in each of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import Failure
from pipeline.rows import Item
from pipeline.sinks.pictures import pictures
from pipeline.sinks.shard import Images, Shard
from pipeline.storage import Store

ROWS_PER_GROUP = 100
# Rows with images end their group early: a group is in memory as a whole, here and at its readers.
BYTES_PER_GROUP = 128 * 2**20

IMAGE = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
# What `datasets` reads a column's kind from; it finds out the others by their Arrow types.
HUGGINGFACE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


@dataclass(frozen=True)
class ParquetSink:
    """The two tables, with the images themselves in ``captions`` if they are to be kept."""

    keep_images: bool = False
    name: ClassVar[str] = "parquet"
    owns: ClassVar[tuple[str, ...]] = ("captions", "dead_letters")

    @property
    def needs_images(self) -> bool:
        return self.keep_images

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        """A table without rows has no file, but for that of the first shard, which shows its schema."""
        schema = shard.captions.schema
        if self.keep_images:
            groups = _with_images(shard, images)
            schema = schema.append(IMAGE).with_metadata((schema.metadata or {}) | HUGGINGFACE)
        else:
            groups = iter([shard.captions])
        _write(store, "captions", shard.number, schema, groups, shard.captions.num_rows)
        letters = shard.dead_letters
        _write(store, "dead_letters", shard.number, letters.schema, [letters], letters.num_rows)

    def finish(self, store: Store) -> None:
        """Nothing is left to do."""


def _write(
    store: Store, folder: str, number: int, schema: pa.Schema, groups: Iterable[pa.Table], num_rows: int
) -> None:
    name = f"{folder}/part-{number:06d}.parquet"
    if not num_rows and number:
        store.delete(name)  # of an earlier time, before its rows were tried again
        return
    options: dict[str, Any] = {"compression": "zstd"}
    if IMAGE.name in schema.names:
        options["write_batch_size"] = 1  # a page's size is looked at between batches, and it must fit 2 GiB
    with store.writer(name) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for group in groups:
            writer.write_table(group.cast(schema), row_group_size=ROWS_PER_GROUP)


def _with_images(shard: Shard, images: Images) -> Iterator[pa.Table]:
    """The captions with their images, a row group at a time."""
    start, values, num_bytes = 0, [], 0
    for index, value in _image_of_each_row(shard, images):
        values.append(value)
        num_bytes += len(value["bytes"]) if value else 0
        if len(values) == ROWS_PER_GROUP or num_bytes >= BYTES_PER_GROUP:
            yield _group(shard, start, values)
            start, values, num_bytes = index + 1, [], 0
    if values:
        yield _group(shard, start, values)


def _group(shard: Shard, start: int, values: list[dict[str, Any] | None]) -> pa.Table:
    rows = shard.captions.slice(start, len(values))
    return rows.append_column(IMAGE, pa.array(values, IMAGE.type))


def _image_of_each_row(shard: Shard, images: Images) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Places in the table of captions, and their images."""
    place, rows = 0, shard.captions["index"].to_pylist()
    for index, item, image in pictures(shard, images):
        value = _value(item, image)
        while place < len(rows) and rows[place] == index:
            yield place, value
            place += 1


def _value(item: Item, image: bytes | Failure) -> dict[str, Any] | None:
    return None if isinstance(image, Failure) else {"bytes": image, "path": PurePosixPath(item.path).name}
