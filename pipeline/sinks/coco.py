"""``captions.coco.json``: all captions of a run in COCO's form, made from the parquet files at the end.

An image's id is its row's number. ``file_name`` is the path below the input folder where the key is one, and
the whole path otherwise. Images without a caption are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import pyarrow.parquet as pq

from pipeline.sinks.plain import to_json
from pipeline.sinks.shard import Images, Shard
from pipeline.storage import Store

FILE = "captions.coco.json"
COLUMNS = ["index", "key", "path", "width", "height", "prompt_id", "caption", "model", "policy", "run_id"]
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class CocoSink:
    """One file for all shards; a batch of rows is in memory at a time."""

    name: ClassVar[str] = "coco"
    needs_images: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = (FILE,)

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        """Nothing yet."""

    def finish(self, store: Store) -> None:
        with store.writer(FILE) as file:
            file.write(f'{{"info": {to_json(_info(store))},\n"licenses": [],\n"images": ['.encode())
            _write(file, _images(store))
            file.write(b'],\n"annotations": [')
            _write(file, _annotations(store))
            file.write(b"]}\n")


def _write(file: BinaryIO, records: Iterable[dict[str, Any]]) -> None:
    for number, record in enumerate(records):
        file.write((",\n" if number else "\n").encode() + to_json(record).encode())


def _info(store: Store) -> dict[str, Any]:
    run = next(({name: row[name] for name in ("run_id", "model", "policy")} for row in _rows(store)), {})
    return {"description": "Captions of images", "version": "1.0"} | run


def _images(store: Store) -> Iterator[dict[str, Any]]:
    before = None
    for row in _rows(store):
        if row["index"] != before:
            yield {
                "id": row["index"],
                "file_name": _file_name(row["key"], row["path"]),
                "width": row["width"],
                "height": row["height"],
                "key": row["key"],
            }
        before = row["index"]


def _annotations(store: Store) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_rows(store), start=1):
        yield {
            "id": number,
            "image_id": row["index"],
            "caption": row["caption"],
            "prompt_id": row["prompt_id"],
        }


def _file_name(key: str, path: str) -> str:
    return key if f"/{path}".endswith(f"/{key}") else path


def _rows(store: Store) -> Iterator[dict[str, Any]]:
    for name in store.list("captions"):
        if name.endswith(".parquet"):
            with store.open(name) as file, pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=COLUMNS):
                    yield from batch.to_pylist()
