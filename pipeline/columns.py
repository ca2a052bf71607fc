"""Values <-> Arrow columns: the only place that knows how a row looks between two stages.

A row is a value or the ``Failure`` that ended it. Every column keeps its type and rank in every batch, so
that Ray never falls back on pickled objects: a failed row holds arrays of zero rows, never None.

| column | type | holds |
|---|---|---|
| image | binary | the file's bytes |
| pixels | uint8 [k + 1, side, side, 3] | ``Partitions.pixels`` |
| grid | int32 [2] | rows and columns of sub-images |
| content | int32 [4] | top, left, bottom, right of the picture on the canvas |
| height, width | int32 | the upright picture before fitting |
| features | float16 or float32 [n, d] | ``VisualTokens.features``; Arrow has no bfloat16 |
| token_partition, token_patch | int32 [n] | where each token comes from |
| num_before | int32 | tokens before dropping |
| caption, finish_reason, prompt_tokens, ... | string, int32 | ``Caption`` without its token ids |
| stage, error_type, error, retryable | string, bool | the ``Failure``; "" and False in a row that goes on |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hired.errors import HiredError
from hired.types import Box, Caption, Grid, Partitions, Size, VisualTokens

Batch: TypeAlias = dict[str, NDArray[Any]]
Row: TypeAlias = Mapping[str, Any]
Value = TypeVar("Value")

MAX_ERROR_CHARACTERS = 500
_RAGGED = ("pixels", "features", "token_partition", "token_patch")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row ended, and in which stage."""

    stage: str
    error_type: str
    error: str
    retryable: bool

    @classmethod
    def of(cls, error: Exception, stage: str) -> Failure:
        retryable = error.retryable if isinstance(error, HiredError) else _is_transient(error)
        return cls(stage, type(error).__name__, printable(str(error))[:MAX_ERROR_CHARACTERS], retryable)


def _is_transient(error: Exception) -> bool:
    lasting = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    transient = OSError | MemoryError | torch.OutOfMemoryError
    return isinstance(error, transient) and not isinstance(error, lasting)


def printable(text: str) -> str:
    """The text as Arrow can hold it: what is not UTF-8, as in some file names, is written out as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def of_images(rows: Sequence[bytes | Failure]) -> Batch:
    return _columns(rows, lambda data: {"image": data}, {"image": b""})


def to_images(batch: Batch) -> list[bytes | Failure]:
    return _values(batch, lambda row: bytes(row["image"]))


def of_partitions(rows: Sequence[Partitions | Failure]) -> Batch:
    blank = _position(None) | {"pixels": np.zeros((0, 0, 0, 3), np.uint8), "content": np.zeros(4, np.int32)}
    return _columns(rows, _partitions_row, blank)


def to_partitions(batch: Batch) -> list[Partitions | Failure]:
    """Their pixels are views of the batch, read-only where the batch is."""
    return _values(
        batch, lambda row: Partitions(row["pixels"], _grid(row), Box(*map(int, row["content"])), _size(row))
    )


def of_tokens(rows: Sequence[VisualTokens | Failure], dtype: torch.dtype) -> Batch:
    """Features travel as ``dtype``, float16 or float32, whatever rows failed."""
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"features travel as float16 or float32, not as {dtype}")
    nothing = {
        "features": torch.zeros((0, 0), dtype=dtype).numpy(),
        "token_partition": np.zeros(0, np.int32),
        "token_patch": np.zeros(0, np.int32),
        "num_before": 0,
    }
    return _columns(rows, lambda tokens: _tokens_row(tokens, dtype), _position(None) | nothing)


def to_tokens(batch: Batch) -> list[VisualTokens | Failure]:
    return _values(
        batch,
        lambda row: VisualTokens(
            features=torch.tensor(row["features"]),
            partition=torch.tensor(row["token_partition"], dtype=torch.int64),
            patch=torch.tensor(row["token_patch"], dtype=torch.int64),
            grid=_grid(row),
            original_size=_size(row),
            num_before=int(row["num_before"]),
        ),
    )


def of_captions(rows: Sequence[Caption | Failure]) -> Batch:
    return _columns(rows, _caption_row, _caption_row(None))


def failures(batch: Batch) -> list[Failure | None]:
    """The failure of each row, None for rows that go on."""
    names = ("stage", "error_type", "error", "retryable")
    rows = zip(*(batch[name] for name in names), strict=True)
    return [Failure(str(s), str(t), str(e), bool(r)) if t else None for s, t, e, r in rows]


def _values(batch: Batch, value: Callable[[Row], Value]) -> list[Value | Failure]:
    return [
        failure or value({name: column[index] for name, column in batch.items()})
        for index, failure in enumerate(failures(batch))
    ]


def _columns(rows: Sequence[Value | Failure], row: Callable[[Value], Row], blank: Row) -> Batch:
    """One column a key of ``blank``, which stands for failed rows, and the columns of the failures."""
    none = Failure("", "", "", False)
    values = [blank if isinstance(value, Failure) else row(value) for value in rows]
    ends = [asdict(value if isinstance(value, Failure) else none) for value in rows]
    return _stacked(values) | _stacked(ends)


def _stacked(rows: Sequence[Row]) -> Batch:
    return {name: _column(name, [row[name] for row in rows]) for name in rows[0]} if rows else {}


def _column(name: str, values: Sequence[Any]) -> NDArray[Any]:
    if name in _RAGGED or isinstance(values[0], str | bytes):
        column = np.empty(len(values), dtype=object)
        for index, value in enumerate(values):  # one by one: numpy would stack arrays of equal shape
            column[index] = value
        return column
    return np.array(values, dtype=np.bool_ if isinstance(values[0], bool) else np.int32)


def _partitions_row(partitions: Partitions) -> Row:
    box = partitions.content
    return _position(partitions) | {
        "pixels": partitions.pixels,
        "content": np.array([box.top, box.left, box.bottom, box.right], np.int32),
    }


def _tokens_row(tokens: VisualTokens, dtype: torch.dtype) -> Row:
    return _position(tokens) | {
        "features": tokens.features.to(dtype).numpy(),
        "token_partition": tokens.partition.numpy().astype(np.int32),
        "token_patch": tokens.patch.numpy().astype(np.int32),
        "num_before": tokens.num_before,
    }


def _caption_row(caption: Caption | None) -> Row:
    return {
        "caption": caption.text if caption else "",
        "finish_reason": caption.finish_reason if caption else "",
        "prompt_tokens": caption.prompt_tokens if caption else 0,
        "visual_tokens_full": caption.visual_tokens_full if caption else 0,
        "visual_tokens_kept": caption.visual_tokens_kept if caption else 0,
        "completion_tokens": caption.completion_tokens if caption else 0,
    }


def _position(value: Partitions | VisualTokens | None) -> dict[str, Any]:
    """Grid and size of the picture; zeros for a picture that never became one."""
    grid, size = (value.grid, value.original_size) if value else (None, None)
    return {
        "grid": np.array([grid.rows, grid.cols] if grid else [0, 0], np.int32),
        "height": size.height if size else 0,
        "width": size.width if size else 0,
    }


def _grid(row: Row) -> Grid:
    return Grid(*map(int, row["grid"]))


def _size(row: Row) -> Size:
    return Size(int(row["height"]), int(row["width"]))
