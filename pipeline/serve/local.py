"""All stages in this process: for tests, and for trying things out without Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import numpy as np
from numpy.typing import NDArray

from hired.budget import Budget
from hired.types import Caption, Partitions, VisualTokens
from pipeline.config import Config
from pipeline.serve.backend import EngineLoad, ModelCard, Query
from pipeline.serve.workers import EncodeWorker, GenerateWorker, PartitionWorker


class LocalBackend:
    """One worker a stage. Belongs to the event loop that first uses it."""

    def __init__(self, config: Config) -> None:
        self._partition = PartitionWorker(config)
        self._encode = EncodeWorker(config)
        self._generate = GenerateWorker(config)

    async def card(self) -> ModelCard:
        return await self._encode.card()

    async def partition(self, image: bytes) -> Partitions:
        return await self._partition.partition(image)

    async def encode(self, partitions: Partitions, budget: Budget, policy: str) -> VisualTokens:
        return await self._encode.encode(partitions, budget, policy)

    async def see(self, image: bytes, budget: Budget, policy: str) -> VisualTokens:
        return await self.encode(await self.partition(image), budget, policy)

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        return await self._encode.attention(partitions, layers)

    def stream(
        self, query: Query, images: Sequence[VisualTokens], *, in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        return self._generate.stream(query, images, in_parts)

    async def health(self) -> None:
        self._encode.check_health()
        self._generate.check_health()

    async def loads(self) -> Sequence[EngineLoad]:
        return [self._generate.load()]
