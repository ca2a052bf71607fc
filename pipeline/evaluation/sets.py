"""Sets of tasks: those that are drawn, and parquet files that anybody brings.

A parquet file of a task has the columns ``image`` (struct of bytes and path, as Hugging Face's datasets write
it, or bytes alone), ``question`` and ``answers`` (a list, or one text), and may have ``key``, ``task``,
``metric`` and ``max_new_tokens``. Items of one picture are found together by its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hired.errors import ConfigurationError
from hired.evaluation.items import Item, Picture
from hired.evaluation.scoring import check_metric
from hired.evaluation.tasks import draw
from pipeline.evaluation.options import Options

_FEATURES = {
    "key": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "picture": {"dtype": "string", "_type": "Value"},
    "question": {"dtype": "string", "_type": "Value"},
    "answers": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "task": {"dtype": "string", "_type": "Value"},
    "metric": {"dtype": "string", "_type": "Value"},
    "max_new_tokens": {"dtype": "int32", "_type": "Value"},
}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("picture", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("max_new_tokens", pa.int32()),
    ],
    # With it, Hugging Face's datasets show pictures and not bytes.
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
ROWS_PER_GROUP = 100


def pictures(options: Options) -> list[Picture]:
    """All that is asked, picture by picture; raises ConfigurationError for files that do not say enough."""
    limit = options.wanted.pictures
    if not options.tasks:
        return list(draw(limit, options.drawing_seed, most=options.questions))
    found = by_picture([item for task in options.tasks for item in _read(task, options.max_new_tokens)])
    return found[: options.pictures] if options.pictures else found


def write(folder: Path, drawn: Iterable[Picture]) -> list[Path]:
    """Each task as a parquet file of its own, named after it."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for picture in drawn:
        for item in picture.items:
            rows[item.task].append(
                {
                    "key": item.key,
                    "image": {"bytes": picture.data, "path": f"{picture.key}.jpg"},
                    "picture": picture.key,
                    "question": item.question,
                    "answers": item.answers,
                    "task": item.task,
                    "metric": item.metric,
                    "max_new_tokens": item.max_new_tokens,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task, own in rows.items():
        files.append(folder / f"{task}.parquet")
        pq.write_table(pa.Table.from_pylist(own, SCHEMA), files[-1], row_group_size=ROWS_PER_GROUP)
    return files


def by_picture(items: Sequence[tuple[Item, bytes]]) -> list[Picture]:
    """The pictures in the order in which they come first, each with all of its items."""
    data: dict[str, bytes] = {}
    own: dict[str, list[Item]] = defaultdict(list)
    keys: set[str] = set()
    for item, image in items:
        if item.key in keys:
            raise ConfigurationError(f"--tasks: two items have the key {item.key!r}; keys must differ")
        keys.add(item.key)
        data.setdefault(item.picture, image)
        own[item.picture].append(item)
    return [Picture(key, data[key], tuple(own[key])) for key in data]


def _read(task: str, max_new_tokens: int) -> Iterator[tuple[Item, bytes]]:
    """The items of ``FILE`` or ``FILE=METRIC``, with their pictures' bytes."""
    file, _, metric = task.partition("=")
    path = Path(file).expanduser()
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"--tasks {file} cannot be read: {error}") from error
    names = table.schema_arrow.names
    if missing := {"image", "question", "answers"} - set(names):
        raise ConfigurationError(f"--tasks {file} has no column {', '.join(sorted(missing))}")
    if not metric and "metric" not in names:
        raise ConfigurationError(f"--tasks {file} says no metric; write {file}=METRIC, such as {file}=anls")
    if metric:
        check_metric(metric)
    number = 0
    for batch in table.iter_batches(ROWS_PER_GROUP, columns=[name for name in names if name in _FEATURES]):
        for row in batch.to_pylist():
            yield _item(row, path, number, metric, max_new_tokens)
            number += 1


def _item(
    row: dict[str, Any], path: Path, number: int, metric: str, max_new_tokens: int
) -> tuple[Item, bytes]:
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    if not image:
        raise ConfigurationError(f"--tasks {path}: row {number} holds no bytes of an image")
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
    if not answers:
        raise ConfigurationError(f"--tasks {path}: row {number} has no answer")
    named = metric or row["metric"]
    check_metric(named)
    item = Item(
        key=row.get("key") or f"{path.stem}-{number}",
        task=row.get("task") or path.stem,
        picture=hashlib.sha256(image).hexdigest()[:16],
        question=row["question"],
        answers=tuple(answers),
        metric=named,
        max_new_tokens=row.get("max_new_tokens") or max_new_tokens,
    )
    return item, image
