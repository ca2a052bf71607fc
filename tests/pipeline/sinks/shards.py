"""Shards, and images to go with them, made on the spot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.columns import Failure
from pipeline.rows import Item, to_table
from pipeline.sinks import CAPTIONS, DEAD_LETTERS, Shard

GONE = Failure("read", "FileNotFoundError", "no such file", False)
UNREADABLE = Failure("partition", "UnreadableImageError", "the image is empty (0 bytes)", False)


def picture(color: str, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), color).save(file, kind)
    return file.getvalue()


def shard(
    answers: Sequence[tuple[str, Mapping[str, str | Failure]]],
    *,
    number: int = 0,
    first_index: int = 0,
    carried: Mapping[str, pa.Array] | None = None,
    kept: Sequence[str] = (),
) -> Shard:
    """Rows given as their key and their answers by prompt id; ``kept`` of ``carried`` are in the captions."""
    numbered = list(enumerate(answers, first_index))
    rows = to_table(Item(key, f"/in/{key}", f"/in/{key}") for key, _ in answers)
    rows = rows.add_column(0, "index", pa.array([index for index, _ in numbered], pa.int64()))
    for name, column in (carried or {}).items():
        rows = rows.append_column(name, column)
    captions: list[dict[str, Any]] = []
    letters: list[dict[str, Any]] = []
    for index, (key, texts) in numbered:
        label = {"index": index, "key": key, "path": f"/in/{key}"}
        for prompt_id, text in texts.items():
            if isinstance(text, Failure):
                letters.append(label | {"prompt_id": prompt_id} | _failed(text))
            else:
                captions.append(label | _caption(text, prompt_id))
    own = rows.select(list(kept)).take(pa.array([row["index"] - first_index for row in captions], pa.int64()))
    table = pa.Table.from_pylist(captions, schema=CAPTIONS)
    for name in kept:
        table = table.append_column(own.schema.field(name), own[name])
    return Shard(number, table, pa.Table.from_pylist(letters, schema=DEAD_LETTERS), rows)


def simple(*keys: str, number: int = 0, first_index: int = 0) -> Shard:
    """A caption a key."""
    answers = [(key, {"default": f"a caption of {key}"}) for key in keys]
    return shard(answers, number=number, first_index=first_index)


def _caption(text: str, prompt_id: str) -> dict[str, Any]:
    return {
        "width": 16, "height": 12, "model": "m", "policy": "hired", "prompt": f"{prompt_id}?",
        "prompt_id": prompt_id, "caption": text, "finish_reason": "stop", "prompt_tokens": 30,
        "visual_tokens_full": 20, "visual_tokens_kept": 9, "completion_tokens": 3, "run_id": "run-1",
    }  # fmt: skip


def _failed(failure: Failure) -> dict[str, Any]:
    return {name: getattr(failure, name) for name in ("stage", "error_type", "error", "retryable")}


class Pictures:
    """Opens rows: the bytes by key, and notes how many are in somebody's hands at a time."""

    def __init__(self, by_key: Mapping[str, bytes | Failure]) -> None:
        self.by_key = by_key
        self.opened: list[str] = []

    def __call__(self, items: Sequence[Item]) -> Iterator[bytes | Failure]:
        for item in items:
            self.opened.append(item.key)
            yield self.by_key[item.key]


def no_images(items: Sequence[Item]) -> Iterator[bytes | Failure]:
    raise AssertionError("nobody asked for images")
