"""Real HTTP servers for tests: any number of applications on one event loop, each on a port of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.types import ASGIApp

from hired.budget import Budget
from hired.errors import UnreadableImageError
from hired.types import Box, Caption, Grid, Partitions, Size, VisualTokens
from pipeline.serve.backend import EngineLoad, ModelCard, Query


class Servers:
    """A thread with an event loop, for as long as the block lasts."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._servers: list[tuple[uvicorn.Server, asyncio.Future[None]]] = []
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Servers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, _ in self._servers:
            server.should_exit = server.force_exit = True
        for _, ended in self._servers:
            ended.result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)

    def add(self, app: ASGIApp) -> str:
        """Where the application now is."""
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        ended = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self.loop)
        self._servers.append((server, ended))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class FakeBackend:
    """Sees pictures whose bytes begin with ``picture`` and says ``words``; halts after ``hold_after`` words.

    ``release`` lets go of those that halt; ``begun`` and ``given_up`` count answers.
    """

    def __init__(self, words: Sequence[str] = ("a", " red", " fox"), hold_after: int | None = None) -> None:
        self.words, self.hold_after = words, hold_after
        self.begun = self.given_up = 0
        self.error: Exception | None = None
        self.illness: Exception | None = None
        self.release = threading.Event()
        self.queries: list[Query] = []
        self.kept: list[tuple[Budget, str]] = []

    async def card(self) -> ModelCard:
        return ModelCard(12, 2, 3, 1)

    async def partition(self, image: bytes) -> Partitions:
        if not image.startswith(b"picture"):
            raise UnreadableImageError("not a picture")
        return Partitions(np.zeros((2, 12, 12, 3), np.uint8), Grid(1, 1), Box(0, 0, 12, 12), Size(12, 12))

    async def encode(self, partitions: Partitions, budget: Budget, policy: str) -> VisualTokens:
        import torch

        self.kept.append((budget, policy))
        one = torch.zeros(1, dtype=torch.int64)
        return VisualTokens(torch.zeros(1, 3), one, one, Grid(1, 1), Size(12, 12), 8)

    async def see(self, image: bytes, budget: Budget, policy: str) -> VisualTokens:
        return await self.encode(await self.partition(image), budget, policy)

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        return {}

    async def stream(
        self, query: Query, images: Sequence[VisualTokens], *, in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        self.begun += 1
        self.queries.append(query)
        has_ended = False
        try:
            for number, word in enumerate(self.words):
                if number == self.hold_after:
                    while not self.release.is_set():
                        await asyncio.sleep(0.01)
                if in_parts:
                    yield word
            if self.error:
                raise self.error
            yield Caption("".join(self.words), tuple(range(len(self.words))), "stop", 9, 8, 2)
            has_ended = True
        finally:
            self.given_up += not has_ended

    async def health(self) -> None:
        if self.illness:
            raise self.illness

    async def loads(self) -> Sequence[EngineLoad]:
        return [EngineLoad("fake", self.begun - self.given_up, 0, 5, 9)]
