"""``txt/KEY.txt``: each caption in a file of its own, as trainers of diffusion models read them.

They lie below the output, never beside somebody's images. The first question's answers have the keys' names,
those of further ones ``KEY+PROMPT_ID.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from pipeline.sinks.names import sidecar_name, suffix_name
from pipeline.sinks.shard import Images, Shard
from pipeline.storage import Store

# A small file is all waiting, for a disk to sync or for S3 to answer.
WRITERS = 16


@dataclass(frozen=True)
class SidecarSink:
    """``first_prompt`` is the question whose answers need no mark; the shard's first one if not given."""

    first_prompt: str | None = None
    name: ClassVar[str] = "txt"
    needs_images: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = ("txt",)

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        with ThreadPoolExecutor(WRITERS) as writers:
            for _ in writers.map(lambda file: store.write(*file), list(self._files(shard))):
                pass

    def finish(self, store: Store) -> None:
        """Nothing is left to do."""

    def _files(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        rows = shard.captions.select(["key", "prompt_id", "caption"]).to_pylist()
        first = self.first_prompt or (rows[0]["prompt_id"] if rows else None)
        for row in rows:
            mark = "" if row["prompt_id"] == first else "+" + suffix_name(row["prompt_id"])
            yield f"txt/{sidecar_name(row['key'])}{mark}.txt", row["caption"].encode()
