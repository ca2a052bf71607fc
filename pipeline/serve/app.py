"""The HTTP application: OpenAI's chat completions over a ``Backend``, behind a gate.

POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics   GET /openapi.json
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from hired.errors import HiredError
from pipeline.serve import errors, playground, requests
from pipeline.serve.admission import Admission
from pipeline.serve.api_error import SERVER, ApiError, come_back, invalid
from pipeline.serve.backend import Backend
from pipeline.serve.chat import Chat
from pipeline.serve.gate import Gate
from pipeline.serve.images import ImageSource
from pipeline.serve.keys import WITHOUT_KEYS, Keys
from pipeline.serve.responses import ChatCompletion, ErrorResponse, Model, ModelList
from pipeline.serve.settings import Settings
from pipeline.serve.telemetry import Telemetry

Result = TypeVar("Result")

# Whoever asks for the health more often gets what was found last.
HEALTH_FOR_S = 1.0
HEALTH_TIMEOUT_S = 10.0
# What any route may answer, in one shape.
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in (
        (400, "The request is wrong; `param` names where"),
        (401, "No key of this server"),
        (403, "The host's name is not allowed"),
        (404, "No such model or route"),
        (405, "The route does not take this method"),
        (413, "The body is too large"),
        (415, "The body is no JSON"),
        (429, "Too many requests of this key; see Retry-After"),
        (500, "The server failed"),
        (503, "The server is busy or starting; see Retry-After"),
        (504, "The request took too long"),
    )
}


def create_app(
    settings: Settings,
    backend: Backend,
    keys: Keys = WITHOUT_KEYS,
    *,
    source: ImageSource | None = None,
    admission: Admission | None = None,
    sends_request_id: bool = True,
) -> FastAPI:
    """The application; ``backend`` does the work.

    ``source`` reads images and ``admission`` lets requests in; by default both are as the settings say.
    ``sends_request_id`` is False where a proxy in front gives requests their ids and tells the client.
    """
    telemetry = Telemetry()
    source = source or ImageSource(settings)
    app = FastAPI(
        title="hired",
        summary="Answers about images, with most visual tokens dropped before the language model sees them.",
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
    )
    _add_handlers(app, telemetry, settings)
    _add_routes(app, settings, backend, telemetry)
    chat = Chat(settings, backend, source, telemetry)
    _add_chat(app, chat)
    open_paths = {"/health"}
    if settings.playground:
        app.include_router(playground.router(backend, settings, source))
        open_paths |= {"/", *(f"/playground/{name}" for name in playground.MEDIA_TYPES)}
    routes = frozenset({*app.openapi()["paths"], *open_paths, "/openapi.json"})
    app.add_middleware(
        Gate,
        settings=settings,
        keys=keys,
        telemetry=telemetry,
        admission=admission or Admission(settings.limits.in_flight, settings.limits.retry_after_s),
        sends_request_id=sends_request_id,
        open_paths=frozenset(open_paths),
        routes=routes,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_routes(app: FastAPI, settings: Settings, backend: Backend, telemetry: Telemetry) -> None:
    model = Model(id=settings.model_name, created=int(time.time()))
    health = Health(backend)

    @app.get("/health")
    async def get_health() -> dict[str, str]:
        """Whether every stage can work; needs no key."""
        await health.check()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def get_metrics() -> Response:
        """Prometheus' text format."""
        text = telemetry.exposition(await backend.loads())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def get_models() -> ModelList:
        """What can be asked."""
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Model:
        """One model."""
        if name != model.id:
            raise ApiError(404, f"this server has the model {model.id!r} only", code="model_not_found")
        return model


def _add_chat(app: FastAPI, chat: Chat) -> None:
    schema = requests.schema()
    components = schema.pop("$defs")

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    async def post_chat(http: Request) -> Response:
        """An answer to a conversation about images, whole or streamed."""
        request = requests.parsed(await _json_body(http))
        task = chat.task(request)
        id = f"chatcmpl-{http.state.request_id}"
        if not request.stream:
            whole = await while_listening(http, chat.whole(task, id))
            return Response(whole.model_dump_json(), media_type="application/json")
        options = request.stream_options
        with_usage = bool(options and options.include_usage)
        events = await while_listening(http, chat.begun(task, id, with_usage=with_usage))
        return EventStream(events)

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        described = plain()
        described["components"]["schemas"].update(components)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _add_handlers(app: FastAPI, telemetry: Telemetry, settings: Settings) -> None:
    """Every failure in one shape."""

    def answered(error: ApiError) -> Response:
        telemetry.failed(error)
        return JSONResponse(error.body, error.status, dict(error.headers))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # raised while the body was read
            return answered(error.__cause__)
        return answered(ApiError(error.status_code, str(error.detail), headers=error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        return answered(invalid(f"{param or 'the body'}: {first['msg']}", param or None))

    @app.exception_handler(ApiError)
    async def of_api(_: Request, error: ApiError) -> Response:
        return answered(error)

    @app.exception_handler(HiredError)
    async def of_hired(_: Request, error: HiredError) -> Response:
        return answered(
            errors.of_image(error, "image_url") or errors.logged(error, settings.limits.retry_after_s)
        )


async def _json_body(http: Request) -> bytes:
    """The body, if it says that it is JSON: a web page of another host cannot say so without asking first."""
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="no_json")
    return await http.body()


async def while_listening(http: Request, work: Awaitable[Result]) -> Result:
    """The result, unless the client goes away: then the work is cancelled, and nobody is told."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", code="client_closed")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; what makes them is ended with the response, whichever way that ends."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            close: Callable[[], Awaitable[None]] = self._events.aclose  # type: ignore[attr-defined]
            await close()


class Health:
    """The backend's health, asked at most once a second however many want to know."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._checked_s = float("-inf")
        self._error: ApiError | None = None
        self._lock = asyncio.Lock()

    async def check(self) -> None:
        """Raises ApiError if a stage cannot work."""
        async with self._lock:
            if time.monotonic() - self._checked_s > HEALTH_FOR_S:
                self._error = await self._found()
                self._checked_s = time.monotonic()
        if self._error is not None:
            raise self._error

    async def _found(self) -> ApiError | None:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._backend.health()
        except Exception as error:
            errors.logged(error)
            return come_back(503, "a stage cannot work just now", SERVER, "unhealthy", 1)
        return None
