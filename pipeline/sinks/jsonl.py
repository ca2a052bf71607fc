"""``jsonl/part-NNNNNN.jsonl``: a caption a line, with all columns of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.sinks.plain import to_json
from pipeline.sinks.shard import Images, Shard
from pipeline.storage import Store

ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class JsonLinesSink:
    """A shard without captions has no file."""

    name: ClassVar[str] = "jsonl"
    needs_images: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = ("jsonl",)

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        name = f"jsonl/part-{shard.number:06d}.jsonl"
        if not shard.captions.num_rows:
            store.delete(name)
            return
        with store.writer(name) as file:
            for batch in shard.captions.to_batches(max_chunksize=ROWS_AT_ONCE):
                file.write("".join(to_json(row) + "\n" for row in batch.to_pylist()).encode())

    def finish(self, store: Store) -> None:
        """Nothing is left to do."""
