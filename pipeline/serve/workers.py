"""The three stages at work for requests, one object a process; they know nothing of deployments.

Each is built on its stage's class and does in the background what would hold up the process's event loop, so
that it can say at any time how it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hired.budget import Budget
from hired.errors import ConfigurationError, EngineDeadError, GenerationError
from hired.generator import Piece
from hired.types import Caption, Partitions, VisualTokens
from pipeline import metrics
from pipeline.config import Config
from pipeline.guard import is_fatal
from pipeline.serve.backend import EngineLoad, ModelCard, Query
from pipeline.serve.deltas import TextStream
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage

log = logging.getLogger(__name__)

# Images that are encoded together at most, so that nobody waits for all of a crowd.
MAX_ENCODE_BATCH = 16
# Texts a second for all streams of a worker together: each takes 3 ms of a CPU on its way through two more
# processes, so with many streams several tokens travel as one.
PARTS_PER_S = 150.0

News: TypeAlias = Piece | Exception | None


class PartitionWorker:
    """Decodes and cuts up images in a process of their own."""

    def __init__(self, config: Config) -> None:
        self._stage = PartitionStage(config)
        self._threads = ThreadPoolExecutor(1, "partition")  # its child does one image at a time

    async def partition(self, image: bytes) -> Partitions:
        """Raises ImageError, or WorkerDiedError for an image that ends its decoder."""
        loop = asyncio.get_running_loop()
        [result] = await loop.run_in_executor(self._threads, self._stage.partition, [image])
        if isinstance(result, Exception):
            raise result
        return result


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """An image to encode, how much of it to keep, and who waits for it."""

    partitions: Partitions
    budget: Budget
    policy: str
    tokens: asyncio.Future[VisualTokens]


class EncodeWorker:
    """Encodes what several requests bring at the same time in one batch.

    Whatever arrives while a batch is at work is the next one. An image that finds the worker idle waits for
    no company, as it would with ``serve.batch``.
    """

    def __init__(self, config: Config) -> None:
        self._encoder = EncodeStage(config).encoder
        self._threads = ThreadPoolExecutor(1, "encode")  # one user of the device at a time
        self._error: Exception | None = None
        self._waiting: list[_Sight] = []
        self._task: asyncio.Task[None] | None = None

    async def card(self) -> ModelCard:
        """What the tower is like."""
        tiling = self._encoder.tiling
        return ModelCard(
            tiling.side, tiling.patches_per_side, self._encoder.num_layers, self._encoder.feature_layer
        )

    async def encode(self, partitions: Partitions, budget: Budget, policy: str) -> VisualTokens:
        """The visual tokens that remain; raises ConfigurationError."""
        sight = _Sight(partitions, budget, policy, asyncio.get_running_loop().create_future())
        self._waiting.append(sight)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await sight.tokens

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None
    ) -> dict[int, NDArray[np.float32]]:
        """What CLS attends to, by layer; raises ConfigurationError."""

        def look() -> dict[int, NDArray[np.float32]]:
            [maps] = self._encoder.cls_attention([partitions], layers=layers)
            return {layer: attention.numpy() for layer, attention in maps.items()}

        return await asyncio.get_running_loop().run_in_executor(self._threads, look)

    def check_health(self) -> None:
        """Raises what made the device unusable."""
        if self._error is not None:
            raise self._error

    async def _work(self) -> None:
        """Encodes until nobody waits."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_ENCODE_BATCH], self._waiting[MAX_ENCODE_BATCH:]
                batch = [sight for sight in batch if not sight.tokens.done()]  # whose asker is still there
                loop = asyncio.get_running_loop()
                metrics.tell("hired_encode_batch_images", len(batch))
                results = await loop.run_in_executor(self._threads, self._encoded, batch)
                for sight, result in zip(batch, results, strict=True):
                    _answer(sight.tokens, result)
        finally:
            self._task = None

    def _encoded(self, sights: Sequence[_Sight]) -> list[VisualTokens | Exception]:
        """One result an image, in order; those that keep alike share a pass."""
        alike: dict[tuple[Budget, str], list[int]] = defaultdict(list)
        for number, sight in enumerate(sights):
            alike[sight.budget, sight.policy].append(number)
        results: dict[int, VisualTokens | Exception] = {}
        for (budget, policy), numbers in alike.items():
            tokens = self._attempt([sights[number].partitions for number in numbers], budget, policy)
            results.update(zip(numbers, tokens, strict=True))
        return [results[number] for number in range(len(sights))]

    def _attempt(
        self, images: Sequence[Partitions], budget: Budget, policy: str
    ) -> Sequence[VisualTokens | Exception]:
        """Where images fail together each one is tried alone, so that one cannot spoil the others."""
        try:
            return self._encoder.encode(images, budget=budget, policy=policy)
        except Exception as error:
            if is_fatal(error):
                log.critical("the encoder's device failed", exc_info=error)
                self._error = error = EngineDeadError("the encoder's device failed; start it again")
            elif len(images) > 1 and not isinstance(error, ConfigurationError):
                return [self._attempt([image], budget, policy)[0] for image in images]
            return [error] * len(images)


def _answer(waiting: asyncio.Future[VisualTokens], result: VisualTokens | Exception) -> None:
    if waiting.done():
        return
    if isinstance(result, Exception):
        waiting.set_exception(result)
    else:
        waiting.set_result(result)


class GenerateWorker:
    """Answers all requests together: one engine, whose batch they join and leave between two steps."""

    def __init__(self, config: Config, parts_per_s: float = PARTS_PER_S) -> None:
        self._generator = GenerateStage(config).generator
        self._parts_per_s = parts_per_s
        self._name = metrics.worker()
        self._num_streams = 0

    async def stream(
        self, query: Query, images: Sequence[VisualTokens], in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        """See ``Backend.stream``. The first text comes at once, later ones as ``parts_per_s`` allows."""
        news, cancel = self._asked(query, images)
        text, unsent, next_s = TextStream(self._generator.prompts.decode, query.stop), "", 0.0
        self._num_streams += in_parts
        try:
            while True:
                piece = _heard(await news.get())
                if piece.token_id is not None and in_parts:
                    unsent += text.add(piece.token_id)
                if piece.caption is not None:
                    caption = _raised(piece.caption)
                    if in_parts and (unsent := unsent + text.finish(caption.text)):
                        yield unsent
                    yield caption
                    return
                now_s = time.monotonic()
                if unsent and now_s >= next_s:
                    yield unsent
                    unsent, next_s = "", now_s + self._num_streams / self._parts_per_s
        finally:
            self._num_streams -= in_parts
            cancel()
            self._gauge()

    def _asked(
        self, query: Query, images: Sequence[VisualTokens]
    ) -> tuple[asyncio.Queue[News], Callable[[], None]]:
        """Where the answer's pieces arrive, and what cancels it."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[News] = asyncio.Queue()

        def tell(piece: News) -> None:
            with suppress(RuntimeError):  # the loop is closed: this process ends
                loop.call_soon_threadsafe(news.put_nowait, piece)

        cancel = self._generator.listen(
            images,
            query.conversation,
            tell,
            max_new_tokens=query.max_new_tokens,
            stop=query.stop,
            sampling=query.sampling,
        )
        self._gauge()
        return news, cancel

    def check_health(self) -> None:
        """Raises EngineDeadError once the engine is."""
        error = getattr(self._generator.engine, "error", None)
        if error is not None:
            raise error

    def _gauge(self) -> None:
        load = self.load()
        metrics.engine(
            running=load.running, waiting=load.waiting, places_free=load.places_free, places=load.places
        )

    def load(self) -> EngineLoad:
        """What the engine holds."""
        counts: Any = getattr(self._generator.engine, "counts", None)
        if counts is None:
            return EngineLoad(self._name, 0, 0, 0, 0)
        return EngineLoad(
            self._name, counts.num_running, counts.num_waiting, counts.num_places_free, counts.num_places
        )


def _heard(news: News) -> Piece:
    """Raises what ended the answer without a piece."""
    if isinstance(news, Exception):
        raise news
    if news is None:
        raise EngineDeadError("the answer ended without a caption")
    return news


def _raised(caption: Caption | GenerationError) -> Caption:
    if isinstance(caption, GenerationError):
        raise caption
    return caption
