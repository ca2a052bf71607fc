"""``webdataset/NNNNN.tar`` and ``NNNNN_stats.json``: a sample an image, as img2dataset writes them.

| member | holds |
|---|---|
| ``KEY.jpg`` | the image's bytes as they were read; the suffix is their format's |
| ``KEY.txt`` | the answer to the first question; missing where that one failed |
| ``KEY.PROMPT_ID.txt`` | the answers to further questions |
| ``KEY.json`` | the input's own JSON, ``txt`` and kept columns by their own names, ours in ``hired`` |

``hired`` tells the key as it was, all answers with their prompts and tokens, and which questions failed.
Where the input has a ``hired`` of its own, as an output that is captioned again has, ``before`` holds that.
Members lie in the order of rows with no time and no owner, so the same shard has the same bytes. The counts
in the stats have img2dataset's names; its times are left out, since they would be others in every try.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from pipeline.columns import Failure
from pipeline.sinks.names import member_name, suffix_name
from pipeline.sinks.pictures import pictures, suffix
from pipeline.sinks.plain import to_json
from pipeline.sinks.shard import CAPTIONS, Images, Shard
from pipeline.storage import Store

OURS = "hired"
ANSWER = ["prompt_id", "prompt", "caption", "finish_reason", "prompt_tokens"]
ANSWER += ["visual_tokens_full", "visual_tokens_kept", "completion_tokens"]
FAILED = ["prompt_id", "stage", "error_type", "error", "retryable"]
# img2dataset's words for where an image was lost.
LOST = {"read": "failed_to_download", "partition": "failed_to_resize"}
LOST_LATER = "failed_to_caption"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class WebDatasetSink:
    """``first_prompt`` is the question whose answers are ``KEY.txt``; the shard's first one if not given."""

    first_prompt: str | None = None
    name: ClassVar[str] = "webdataset"
    needs_images: ClassVar[bool] = True
    owns: ClassVar[tuple[str, ...]] = ("webdataset",)

    def write(self, shard: Shard, store: Store, images: Images) -> None:
        """The tar is there even if it is empty: readers name ranges of tars."""
        lost = _lost(shard)
        first = self.first_prompt or (shard.captions["prompt_id"][0].as_py() if len(shard.captions) else None)
        with (
            store.writer(f"webdataset/{shard.number:05d}.tar") as file,
            tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for sample in _samples(shard, images):
                if isinstance(sample.image, Failure):
                    lost[sample.index] = sample.image
                else:
                    _add(tar, sample.members(sample.image, first))
        stats = _stats(shard.rows.num_rows, list(lost.values()))
        store.write(f"webdataset/{shard.number:05d}_stats.json", to_json(stats, indent=2).encode() + b"\n")

    def finish(self, store: Store) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """An image with its captions, one or more, and the questions about it that failed."""

    index: int
    image: bytes | Failure
    captions: list[Row]
    failures: list[Row]
    own: Row

    def members(self, image: bytes, first_prompt: str | None) -> Iterator[tuple[str, bytes]]:
        name = member_name(self.captions[0]["key"])
        yield f"{name}.{suffix(image)}", image
        for row in self.captions:
            mark = "" if row["prompt_id"] == first_prompt else f".{suffix_name(row['prompt_id'])}"
            yield f"{name}{mark}.txt", row["caption"].encode()
        yield f"{name}.json", to_json(self._json()).encode()

    def _json(self) -> dict[str, Any]:
        shared = [name for name in CAPTIONS.names if name not in ANSWER]
        ours = {name: self.captions[0][name] for name in shared}
        ours["captions"] = [{name: row[name] for name in ANSWER} for row in self.captions]
        ours["failures"] = [{name: row[name] for name in FAILED} for row in self.failures]
        if OURS in self.own:
            ours["before"] = self.own[OURS]
        return {**self.own, OURS: ours}


def _samples(shard: Shard, images: Images) -> Iterator[_Sample]:
    captions = groupby(_rows(shard.captions), lambda row: row["index"])
    failures: dict[int, list[Row]] = {}
    for row in shard.dead_letters.to_pylist():
        failures.setdefault(row["index"], []).append(row)
    documents, kept = _documents(shard), [name for name in shard.carried if name not in ("json", "txt")]
    for (index, _, image), (_, answers) in zip(pictures(shard, images), captions, strict=True):
        rows = list(answers)
        own = documents.get(index, {}) | {name: rows[0][name] for name in kept}
        yield _Sample(index, image, rows, failures.get(index, []), own)


def _rows(table: Any) -> Iterator[Row]:
    for batch in table.to_batches(max_chunksize=500):
        yield from batch.to_pylist()


def _documents(shard: Shard) -> dict[int, dict[str, Any]]:
    """What samples of the input brought along, by row: their JSON and, under ``txt``, their own caption.

    JSON that is no object stays under ``json``.
    """
    names = [name for name in ("json", "txt") if name in shard.rows.column_names]
    documents = {}
    for row in shard.rows.select(["index", *names]).to_pylist() if names else ():
        text = {"txt": row["txt"]} if row.get("txt") is not None else {}
        documents[row["index"]] = text | (_document(row["json"]) if row.get("json") is not None else {})
    return documents


def _document(value: Any) -> dict[str, Any]:
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # it said it was JSON, and is kept as it is
            value = value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, dict) else {"json": value}


def _lost(shard: Shard) -> dict[int, Failure]:
    """Why images have no sample: the first failure of each that has no caption."""
    captioned = set(shard.captions["index"].to_pylist())
    lost: dict[int, Failure] = {}
    for row in shard.dead_letters.to_pylist():
        if row["index"] not in captioned:
            failure = Failure(row["stage"], row["error_type"], row["error"], row["retryable"])
            lost.setdefault(row["index"], failure)
    return lost


def _stats(num_images: int, lost: list[Failure]) -> dict[str, Any]:
    stages = Counter(LOST.get(failure.stage, LOST_LATER) for failure in lost)
    kinds = Counter(f"{failure.stage}: {failure.error_type}" for failure in lost)
    successes = num_images - len(lost)
    return {
        "count": num_images,
        "successes": successes,
        **{name: stages[name] for name in (*LOST.values(), LOST_LATER)},
        "status_dict": {"success": successes, **dict(sorted(kinds.items()))},
    }


def _add(tar: tarfile.TarFile, members: Iterator[tuple[str, bytes]]) -> None:
    for name, content in members:
        member = tarfile.TarInfo(name)  # its time, owner and group are 0
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
