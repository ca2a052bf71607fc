"""The stages: plain classes, ``__init__(config)`` and ``__call__(batch) -> batch``, that know nothing of Ray.

    bytes --PartitionStage--> Partitions --EncodeStage--> VisualTokens --GenerateStage--> Caption

As many rows come out as went in. A row that fails carries its ``Failure`` and is passed on untouched; its
neighbours are worked on. ``ConfigurationError`` is no row's fault and is raised, and so is an error of the
accelerator itself, after which nothing on it can be trusted.
GenerateStage may be called by several threads at once, whose rows share the engine's batches.
Each stage adds two columns: its seconds, shared out over the rows, and its process's peak resident memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import transformers

from hired import families
from hired.devices import resolve_handoff_dtype
from hired.engine import Sampling
from hired.errors import ConfigurationError, ImageError
from hired.partitioning import partition
from hired.types import Caption, Partitions, VisualTokens
from hired.vlm import resolve
from pipeline.columns import (
    Batch,
    Failure,
    of_captions,
    of_partitions,
    of_tokens,
    to_images,
    to_partitions,
    to_tokens,
)
from pipeline.config import Config, Pool
from pipeline.costs import PEAK_RSS, SECONDS, metered

log = logging.getLogger(__name__)

Before = TypeVar("Before")
After = TypeVar("After")
Keyed = tuple[str, VisualTokens]


class PartitionStage:
    """Image bytes -> partitions, on a CPU. The bytes travel no further."""

    name = "partition"

    def __init__(self, config: Config) -> None:
        prepare_worker(config.partition)
        self._max_pixels, self._reduced = config.max_pixels, config.reduced_decoding
        self._tiling = families.tiling(resolve(config.model))

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        rows = attempt(self.name, to_images(batch), self._partition)
        return labels(batch) | of_partitions(rows) | metered(self.name, len(rows), started_s)

    def _partition(self, images: Sequence[bytes]) -> list[Partitions | Exception]:
        return [self._partition_one(image) for image in images]

    def _partition_one(self, image: bytes) -> Partitions | Exception:
        try:
            return partition(image, self._tiling, max_pixels=self._max_pixels, reduced=self._reduced)
        except ImageError as error:
            return error


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

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        rows = attempt(self.name, to_partitions(batch), self._encode)
        return labels(batch) | of_tokens(rows, self._handoff_dtype) | metered(self.name, len(rows), started_s)

    def _encode(self, partitions: Sequence[Partitions]) -> list[VisualTokens]:
        return self._encoder.encode(partitions, budget=self._budget, policy=self._policy)


class GenerateStage:
    """Visual tokens -> captions."""

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
        self._config = config
        self._ended_s = 0.0  # when the last call did; several may run at once

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        keyed: list[Keyed | Failure] = [
            tokens if isinstance(tokens, Failure) else (str(key), tokens)
            for key, tokens in zip(batch["key"], to_tokens(batch), strict=True)
        ]
        rows = attempt(self.name, keyed, self._generate)
        size = {name: batch[name] for name in ("height", "width")}
        # Calls that overlap share their seconds: each is charged from the end of the one before.
        started_s, self._ended_s = max(started_s, self._ended_s), time.perf_counter()
        return labels(batch) | size | of_captions(rows) | metered(self.name, len(rows), started_s)

    def _generate(self, rows: Sequence[Keyed]) -> Sequence[Caption | Exception]:
        config = self._config
        return self._generator.generate(
            [tokens for _, tokens in rows],
            [config.prompt] * len(rows),
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            sampling=[self._sampling(key) for key, _ in rows],
        )

    def _sampling(self, key: str) -> Sampling:
        """The row's own seed, so that it is answered alike in any batch and in any run."""
        config = self._config
        digest = hashlib.blake2b(f"{config.seed}/{key}".encode(), digest_size=8).digest()
        return Sampling(config.temperature, config.top_p, int.from_bytes(digest) >> 1)


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
    except (ConfigurationError, torch.AcceleratorError):
        raise
    except Exception as error:
        if len(values) > 1:
            return [result for value in values for result in _results(stage, [value], work)]
        log.warning("%s failed on a row", stage, exc_info=True)
        return [Failure.of(error, stage)]
    return [Failure.of(result, stage) if isinstance(result, Exception) else result for result in results]


def labels(batch: Batch) -> Batch:
    """The columns that accompany a row through every stage."""
    return {
        name: batch[name] for name in batch if name in ("key", "path") or name.endswith((SECONDS, PEAK_RSS))
    }


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
