"""One chat completion: its images are seen, its conversation is answered, its time is measured."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from hired.budget import Budget
from hired.engine import Sampling
from hired.errors import ConfigurationError
from hired.types import Caption, VisualTokens
from pipeline.serve import errors
from pipeline.serve.api_error import ApiError, invalid
from pipeline.serve.backend import Backend, Query
from pipeline.serve.images import ImageSource
from pipeline.serve.requests import ChatRequest, ImageUrl
from pipeline.serve.responses import ChatCompletion, Chunks, completion, failed
from pipeline.serve.settings import Settings
from pipeline.serve.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Task:
    """A request within the server's limits: what to look at, and what to answer."""

    query: Query
    images: tuple[Picture, ...]
    policy: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a request, and where it stands there."""

    param: str
    url: str
    budget: Budget


class Chat:
    """Answers chat completions with a backend."""

    def __init__(
        self, settings: Settings, backend: Backend, source: ImageSource, telemetry: Telemetry
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._source = source
        self._telemetry = telemetry

    def task(self, request: ChatRequest) -> Task:
        """What the request asks for; raises ApiError where that is beyond the limits."""
        settings, limits = self._settings, self._settings.limits
        if request.model != settings.model_name:
            raise ApiError(
                404,
                f"there is no model {request.model[:100]!r}; this server has {settings.model_name!r}",
                code="model_not_found",
                param="model",
            )
        self._check_messages(request)
        max_tokens = settings.default_max_tokens if request.limit is None else request.limit
        if max_tokens > limits.max_tokens:
            raise invalid(f"an answer may have {limits.max_tokens} tokens at most", "max_completion_tokens")
        images = tuple(
            Picture(f"{param}.image_url", image.url, self._budget(request, image))
            for param, image in request.images()
        )
        if len(images) > limits.images:
            raise invalid(
                f"{len(images)} images; a request may have {limits.images} at most",
                images[limits.images].param,
                "too_many_images",
            )
        query = Query(request.conversation(), max_tokens, tuple(request.stop or ()), _sampling(request))
        return Task(query, images, self._policy(request))

    async def whole(self, task: Task, id: str) -> ChatCompletion:
        """The answer in one piece; raises ApiError."""
        async with self._limited(self._deadline_s()), aclosing(self._answer(task, in_parts=False)) as told:
            async for said in told:
                if isinstance(said, Caption):
                    return completion(id, int(time.time()), self._settings.model_name, said)
        raise RuntimeError("the answer ended without a caption")

    async def begun(self, task: Task, id: str, *, with_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events, once its first text is there.

        What fails before that raises ApiError, so that it has a status; what fails later is the last event.
        """
        deadline_s = self._deadline_s()
        told = self._answer(task, in_parts=True)
        try:
            async with self._limited(deadline_s):
                first = await anext(told)
        except BaseException:
            await told.aclose()
            raise
        chunks = Chunks(id, int(time.time()), self._settings.model_name, with_usage=with_usage)
        return self._events(first, told, chunks, deadline_s)

    async def _events(
        self,
        first: str | Caption,
        told: AsyncGenerator[str | Caption, None],
        chunks: Chunks,
        deadline_s: float,
    ) -> AsyncIterator[bytes]:
        async with aclosing(told):
            yield chunks.first() + _event(first, chunks)
            try:
                while not isinstance(first, Caption):
                    async with self._limited(deadline_s):
                        first = await anext(told)
                    yield _event(first, chunks)
            except ApiError as error:
                self._telemetry.failed(error)
                yield failed(error)

    async def _answer(self, task: Task, *, in_parts: bool) -> AsyncGenerator[str | Caption, None]:
        """Texts and the caption, measured; raises ApiError."""
        started_s = time.perf_counter()
        images = await self._seen(task)
        first_s: float | None = None
        async with aclosing(self._backend.stream(task.query, images, in_parts=in_parts)) as told:
            async for said in told:
                now_s = time.perf_counter()
                if first_s is None and in_parts:
                    first_s = now_s
                    self._telemetry.first_token(now_s - started_s)
                if isinstance(said, Caption):
                    self._telemetry.answered(said, None if first_s is None else now_s - first_s)
                yield said

    async def _seen(self, task: Task) -> list[VisualTokens]:
        """The visual tokens of all images; the first that fails ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                looks = [group.create_task(self._see(image, task.policy)) for image in task.images]
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return [look.result() for look in looks]

    async def _see(self, image: Picture, policy: str) -> VisualTokens:
        try:
            data = await self._source.read(image.url)
            return await self._backend.see(data, image.budget, policy)
        except Exception as error:
            if isinstance(error, ConfigurationError) and policy != self._settings.policy:
                raise invalid(str(error), "hired.policy") from error  # one that only Python can make
            explained = errors.of_image(error, image.param)
            if explained is None:
                raise
            raise explained from error

    def _deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.limits.request_s

    @asynccontextmanager
    async def _limited(self, deadline_s: float) -> AsyncIterator[None]:
        """Ends what takes too long, and puts every error into the client's words."""
        try:
            async with asyncio.timeout_at(deadline_s):
                yield
        except Exception as error:
            raise errors.logged(error, self._settings.limits.retry_after_s) from error

    def _check_messages(self, request: ChatRequest) -> None:
        limits = self._settings.limits
        if len(request.messages) > limits.messages:
            raise invalid(f"a request may have {limits.messages} messages at most", "messages")
        if request.messages[-1].role == "assistant":
            raise invalid(
                "the last message must be the user's: answers are not continued",
                f"messages[{len(request.messages) - 1}]",
            )
        num_chars = sum(
            len(part) for said in request.conversation() for part in said.parts if part is not None
        )
        if num_chars > limits.prompt_chars:
            raise invalid(f"the texts may have {limits.prompt_chars} characters at most", "messages")

    def _policy(self, request: ChatRequest) -> str:
        own = request.hired.policy if request.hired else None
        if own is not None and own not in self._settings.allowed_policies:
            raise invalid(
                f"this server has the policies {', '.join(self._settings.allowed_policies)}", "hired.policy"
            )
        return own or self._settings.policy

    def _budget(self, request: ChatRequest, image: ImageUrl) -> Budget:
        options = request.hired
        try:
            return self._settings.budget(
                image.detail or "auto",
                options.token_budget if options else None,
                options.alpha if options else None,
            )
        except ConfigurationError as error:
            raise invalid(str(error), "hired.token_budget") from error


def _event(said: str | Caption, chunks: Chunks) -> bytes:
    return chunks.end(said) if isinstance(said, Caption) else chunks.text(said)


def _sampling(request: ChatRequest) -> Sampling:
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    return Sampling(
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=seed,
    )
