"""Where rows end: each answer in exactly one of ``captions/*.parquet`` and ``dead_letters/*.parquet``.

Other formats are written beside them, shard by shard, from the same tables. All names lie below the output
and depend on the shard alone, so that a shard may be written again after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence

from hired.errors import ConfigurationError
from pipeline.sinks.coco import CocoSink
from pipeline.sinks.jsonl import JsonLinesSink
from pipeline.sinks.parquet import IMAGE, ParquetSink
from pipeline.sinks.shard import CAPTIONS, DEAD_LETTERS, Images, Shard, Sink, SinkError
from pipeline.sinks.sidecars import SidecarSink
from pipeline.sinks.webdataset import WebDatasetSink
from pipeline.storage import Store

__all__ = [
    "CAPTIONS",
    "DEAD_LETTERS",
    "FORMATS",
    "Images",
    "Shard",
    "Sink",
    "SinkError",
    "check_columns",
    "sinks",
    "taken",
]

FORMATS = ("parquet", "webdataset", "jsonl", "coco", "txt")


def sinks(formats: Sequence[str], *, keep_images: bool, prompt_ids: Sequence[str] = ()) -> list[Sink]:
    """One sink a format, parquet first in any case; raises ConfigurationError for an unknown one.

    ``prompt_ids`` are the questions of the run in their order: in formats that have one place for a caption,
    the first one's answers go there.
    """
    first = prompt_ids[0] if prompt_ids else None
    made: dict[str, Sink] = {
        "parquet": ParquetSink(keep_images),
        "webdataset": WebDatasetSink(first),
        "jsonl": JsonLinesSink(),
        "coco": CocoSink(),
        "txt": SidecarSink(first),
    }
    if unknown := [name for name in formats if name not in made]:
        raise ConfigurationError(f"--formats {', '.join(unknown)}: there are {', '.join(FORMATS)}")
    return [made[name] for name in FORMATS if name == "parquet" or name in formats]


def check_columns(names: Sequence[str], *, keep_images: bool) -> None:
    """Raise ConfigurationError for columns of the input that would take the place of the output's own."""
    own = [*CAPTIONS.names, *([IMAGE.name] if keep_images else [])]
    if twice := [name for name in names if name in own]:
        raise ConfigurationError(
            f"--keep-columns {', '.join(twice)}: captions have a column of that name already; "
            "leave it out, or rename it in the input"
        )


def taken(store: Store, formats: Sequence[Sink]) -> list[str]:
    """What already lies where these sinks would write, files or folders that hold some."""
    owned = [name for sink in formats for name in sink.owns]
    return [name for name in owned if store.exists(name) or store.list(name)]
