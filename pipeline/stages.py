"""The stages: plain classes, ``__init__(config)`` and ``__call__(batch) -> batch``, that know nothing of Ray.

    bytes --PartitionStage--> Partitions --EncodeStage--> VisualTokens --GenerateStage--> Caption

As many rows come out as went in; GenerateStage makes one of every question about a row, and may be called by
several threads at once, whose rows share the engine's batches.
A row that fails carries its ``Failure`` and is passed on untouched; its neighbours are worked on.
``ConfigurationError`` is no row's fault and is raised, and so is an error of the accelerator itself, after
which nothing on it can be trusted.
Each stage adds two columns: its seconds, shared out over the rows, and its process's peak resident memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import transformers
from numpy.typing import NDArray

from hired import families
from hired.devices import resolve_handoff_dtype
from hired.encoder import Encoder
from hired.engine import Sampling
from hired.errors import ConfigurationError, ImageError
from hired.generator import Generator
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Caption, Partitions, VisualTokens
from hired.vlm import resolve
from pipeline import metrics
from pipeline.columns import (
    Batch,
    Failure,
    of_captions,
    of_images,
    of_partitions,
    of_tokens,
    to_images,
    to_partitions,
    to_tokens,
)
from pipeline.config import Config, Pool
from pipeline.costs import PEAK_RSS, SECONDS, metered
from pipeline.guard import is_fatal
from pipeline.isolation import IsolatedPartitioner
from pipeline.questions import Question, from_json
from pipeline.reading import read
from pipeline.rows import to_items

log = logging.getLogger(__name__)

# What a picture may take while it is decoded, by its pixels: 16 bytes for the worst kind, and then some.
BYTES_PER_PIXEL = 28
# What a row has from its beginning to its end.
LABELS = ("index", "key", "path", "questions", "is_sample")
BYTES_PER_PART = 64 * 2**20

Before = TypeVar("Before")
After = TypeVar("After")


class ReadStage:
    """Rows of an inventory, in Arrow -> rows with their file's bytes; one that cannot be read fails alone."""

    name = "read"

    def __init__(self, config: Config) -> None:
        self._options = config.reading

    def __call__(self, block: pa.Table) -> Iterator[Batch]:
        """As many rows as came in, in parts: a block of large files is never in memory as a whole."""
        images = read(list(to_items(block)), self._options)
        end = 0
        while end < block.num_rows:
            started_s = time.perf_counter()
            rows = list(_part(images))
            start, end = end, end + len(rows)
            metrics.called(self.name, len(rows), time.perf_counter() - started_s)
            part = {name: _numpy(block[name][start:end]) for name in LABELS}
            yield part | of_images(rows) | metered(self.name, len(rows), started_s)


def _part(images: Iterator[bytes | Failure]) -> Iterator[bytes | Failure]:
    """The next images, as many as may be in memory at once."""
    num_bytes = 0
    for image in images:
        yield image
        num_bytes += 0 if isinstance(image, Failure) else len(image)
        if num_bytes >= BYTES_PER_PART:
            return


def _numpy(column: pa.ChunkedArray) -> Any:
    return (
        np.array(column.to_pylist(), dtype=object) if pa.types.is_string(column.type) else column.to_numpy()
    )


class PartitionStage:
    """Image bytes -> partitions, on a CPU. The bytes travel no further."""

    name = "partition"
    work = staticmethod(partition)

    def __init__(self, config: Config) -> None:
        prepare_worker(config.partition)
        tiling = families.tiling(resolve(config.model))
        max_pixels, reduced = config.max_pixels, config.reduced_decoding
        self._child = (
            IsolatedPartitioner(
                tiling,
                max_pixels=max_pixels,
                reduced=reduced,
                timeout_s=config.image_timeout_s,
                max_memory_bytes=max(2**29, BYTES_PER_PIXEL * max_pixels),
                work=self.work,
            )
            if config.isolated_decoding
            else None
        )
        self._partition: Callable[[Sequence[bytes]], list[Partitions | Exception]] = self._child or partial(
            _partitioned, tiling=tiling, max_pixels=max_pixels, reduced=reduced
        )

    @property
    def partition(self) -> Callable[[Sequence[bytes]], list[Partitions | Exception]]:
        """Cuts up images; each one's partitions, or why there are none."""
        return self._partition

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        rows = attempt(self.name, to_images(batch), self._partition)
        peak = self._child.peak_rss_bytes if self._child else 0
        return labels(batch) | of_partitions(rows) | metered(self.name, len(rows), started_s, peak)


def _partitioned(
    images: Sequence[bytes], *, tiling: Tiling, max_pixels: int, reduced: bool
) -> list[Partitions | Exception]:
    """In this process."""

    def one(image: bytes) -> Partitions | Exception:
        try:
            return partition(image, tiling, max_pixels=max_pixels, reduced=reduced)
        except ImageError as error:
            return error

    return [one(image) for image in images]


class EncodeStage:
    """Partitions -> the visual tokens that survive dropping. No pixels travel further."""

    name = "encode"

    def __init__(self, config: Config) -> None:
        prepare_worker(config.encode)
        device, dtype = placement(config)
        self._encoder = families.load_encoder(
            resolve(config.model),
            device=device,
            dtype=dtype,
            max_patches=config.encode.max_patches,
            compile=config.encode.compile,
        )
        self._handoff_dtype = resolve_handoff_dtype(dtype)
        self._budget, self._policy = config.budget, config.policy

    @property
    def encoder(self) -> Encoder:
        """What does the stage's work."""
        return self._encoder

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        rows = attempt(self.name, to_partitions(batch), self._encode)
        return labels(batch) | of_tokens(rows, self._handoff_dtype) | metered(self.name, len(rows), started_s)

    def _encode(self, partitions: Sequence[Partitions]) -> list[VisualTokens]:
        return self._encoder.encode(partitions, budget=self._budget, policy=self._policy)


class GenerateStage:
    """Visual tokens -> captions, one for every question about them."""

    name = "generate"

    def __init__(self, config: Config) -> None:
        prepare_worker(config.generate)
        device, dtype = placement(config)
        self._generator = families.load_generator(
            resolve(config.model),
            device=device,
            dtype=dtype,
            newlines=config.newlines,
            positions=config.positions,
            engine=config.engine.options(config.generate.num_gpus or 0),
        )
        self._ended_s = 0.0  # when the last call did; several may run at once

    @property
    def generator(self) -> Generator:
        """What does the stage's work."""
        return self._generator

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        tokens = to_tokens(batch)
        asked = [from_json(str(questions)) for questions in batch["questions"]]
        source = np.repeat(np.arange(len(asked)), [len(questions) for questions in asked])
        prompts = [question for questions in asked for question in questions]
        rows = attempt(
            self.name,
            [
                _asked(tokens[row], str(batch["key"][row]), question)
                for row, question in zip(source, prompts, strict=True)
            ],
            self._generate,
        )
        self._gauge()
        # Calls that overlap share their seconds: each is charged from the end of the one before.
        started_s, self._ended_s = max(started_s, self._ended_s), time.perf_counter()
        kept = [_kept(tokens[row]) if batch["is_sample"][row] else "" for row in source]
        return (
            _repeated(labels(batch), source)
            | {name: batch[name][source] for name in ("height", "width")}
            | {
                "question": np.array([question.number for question in prompts], np.int32),
                "prompt": np.array([question.prompt for question in prompts], dtype=object),
                "kept": np.array(kept, dtype=object),
            }
            | of_captions(rows)
            | metered(self.name, len(rows), started_s)
        )

    def _generate(self, rows: Sequence[Asked]) -> Sequence[Caption | Exception]:
        return self._generator.generate(
            [row.tokens for row in rows],
            [row.question.prompt for row in rows],
            max_new_tokens=[row.question.max_new_tokens for row in rows],
            stop=[row.question.stop for row in rows],
            sampling=[row.sampling for row in rows],
        )

    def _gauge(self) -> None:
        counts = getattr(self._generator.engine, "counts", None)
        if counts is not None:
            metrics.engine(
                running=counts.num_running,
                waiting=counts.num_waiting,
                places_free=counts.num_places_free,
                places=counts.num_places,
            )


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about an image."""

    key: str
    tokens: VisualTokens
    question: Question

    @property
    def sampling(self) -> Sampling:
        """With a seed of its own, so that it is answered alike in any batch and in any run."""
        question = self.question
        text = f"{question.seed}/{question.id}/{self.key}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return Sampling(question.temperature, question.top_p, int.from_bytes(digest) >> 1)


def _asked(tokens: VisualTokens | Failure, key: str, question: Question) -> Asked | Failure:
    return tokens if isinstance(tokens, Failure) else Asked(key, tokens, question)


def _kept(tokens: VisualTokens | Failure) -> str:
    """Which tokens were kept, for the report: partitions and patches."""
    if isinstance(tokens, Failure):
        return ""
    return json.dumps({"partition": tokens.partition.tolist(), "patch": tokens.patch.tolist()})


def _repeated(batch: Batch, source: NDArray[Any]) -> Batch:
    """The rows numbered so. What a row cost is told once: in its further answers it is NaN."""
    first = np.diff(source, prepend=-1) > 0
    return {
        name: np.where(first, column[source], np.nan) if name.endswith(SECONDS) else column[source]
        for name, column in batch.items()
    }


def attempt(
    stage: str,
    rows: Sequence[Before | Failure],
    work: Callable[[Sequence[Before]], Sequence[After | Exception]],
) -> list[After | Failure]:
    """One result a row, in order; ``work`` never sees failed rows.

    Where ``work`` raises on a batch, every row is tried alone, and only the ones that raise again fail.
    """
    results = iter(_results(stage, [row for row in rows if not isinstance(row, Failure)], work))
    return [row if isinstance(row, Failure) else next(results) for row in rows]


def _results(
    stage: str, values: Sequence[Before], work: Callable[[Sequence[Before]], Sequence[After | Exception]]
) -> list[After | Failure]:
    if not values:
        return []
    try:
        results = work(values)
        if len(results) != len(values):
            raise RuntimeError(f"{stage} returned {len(results)} results for {len(values)} rows")
    except ConfigurationError:
        raise
    except Exception as error:
        if is_fatal(error):
            raise
        if len(values) > 1:
            return [result for value in values for result in _results(stage, [value], work)]
        log.warning("%s failed on a row", stage, exc_info=True)
        return [Failure.of(error, stage)]
    return [Failure.of(result, stage) if isinstance(result, Exception) else result for result in results]


def labels(batch: Batch) -> Batch:
    """The columns that accompany a row through every stage."""
    return {name: batch[name] for name in batch if name in LABELS or name.endswith((SECONDS, PEAK_RSS))}


def prepare_worker(pool: Pool) -> None:
    """Give this process its threads (left alone, every worker would take all cores) and keep it quiet."""
    transformers.utils.logging.disable_progress_bar()
    if pool.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(pool.threads)
        torch.set_num_threads(pool.threads)


def placement(config: Config) -> tuple[str | None, str | None]:
    """Device and dtype as the loaders take them: None lets them choose."""
    return (
        None if config.device == "auto" else config.device,
        None if config.dtype == "auto" else config.dtype,
    )
