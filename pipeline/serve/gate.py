"""What every request passes before and after the application, whatever it asks for.

In this order: a request id, the host's name, the key, the caller's pace, room for one more, the body's size.
All of it is decided from the head alone but for the body, which is counted while it is read, so whoever is
sent away costs nothing and is told at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve import errors
from pipeline.serve.admission import Admission
from pipeline.serve.api_error import ApiError, come_back, send_error
from pipeline.serve.door import TURNED_AWAY, id_of
from pipeline.serve.keys import Keys
from pipeline.serve.pace import Pace
from pipeline.serve.settings import Settings
from pipeline.serve.telemetry import Telemetry

log = logging.getLogger(__name__)

# For the log: whose turn it is.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

# Beyond the time that the application gives itself to answer.
GRACE_S = 5.0
# What the log and the metrics say of a client that did not wait for its answer; nobody gets it.
CLIENT_CLOSED = 499


@dataclass(frozen=True, slots=True)
class _Head:
    """What the gate reads of a request."""

    method: str
    path: str
    host: str
    client: str
    headers: Mapping[bytes, bytes]

    @classmethod
    def of(cls, scope: Scope) -> _Head:
        headers = dict(scope["headers"])
        client = scope.get("client")
        return cls(
            scope["method"],
            scope["path"],
            headers.get(b"host", b"").decode("latin-1"),
            client[0] if client else "-",
            headers,
        )

    @property
    def only_reads(self) -> bool:
        return self.method in ("GET", "HEAD")


class Gate:
    """The application behind its checks.

    ``open_paths`` can be read without a key. ``routes`` are the paths that the log and the metrics name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        keys: Keys,
        telemetry: Telemetry,
        admission: Admission,
        sends_request_id: bool,
        open_paths: frozenset[str],
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._limits = settings.limits
        self._keys = keys
        self._loopback_only = not keys and not settings.without_keys
        self._pace = Pace(settings.limits.requests_per_minute)
        self._telemetry = telemetry
        self._open_paths = open_paths
        self._routes = routes
        self._admission = admission
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:  # no WebSockets here
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = _Head.of(scope)
        id = id_of(head.headers)
        request_id.set(id)
        scope.setdefault("state", {})["request_id"] = id
        answer = _Answer(send, id if self._sends_request_id else None)
        started_s = time.perf_counter()
        self._telemetry.began()
        self._telemetry.turned_away(scope.get(TURNED_AWAY, 0))
        try:
            await self._checked(head, scope, receive, answer)
        except Exception as error:
            await self._tell(errors.logged(error, self._limits.retry_after_s), answer)
        finally:
            seconds = time.perf_counter() - started_s
            route = head.path if head.path in self._routes else "other"
            status = answer.status or CLIENT_CLOSED
            self._telemetry.ended(route, status, seconds)
            log.info("%s %s %s %d %.3f s", id, head.method, route, status, seconds)

    async def _checked(self, head: _Head, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._check_host(head)
        caller = self._caller(head)
        if head.only_reads:
            await self._app(scope, receive, answer)
            return
        if wait_s := self._pace.wait_s(caller):
            raise come_back(
                429, "too many requests a minute", "rate_limit_error", "rate_limit_exceeded", wait_s
            )
        with self._admission:
            async with asyncio.timeout(self._limits.request_s + GRACE_S):
                await self._app(scope, _Counted(receive, head, self._limits.body_bytes), answer)

    def _check_host(self, head: _Head) -> None:
        """Without keys, a web page must not reach this server under a name of its own (DNS rebinding)."""
        if self._loopback_only and not _is_loopback(head.host):
            raise ApiError(
                403, "without API keys this server answers to localhost only", code="host_not_allowed"
            )

    def _caller(self, head: _Head) -> str:
        """Who asks; raises ApiError for somebody without a key."""
        if not self._keys:
            return head.client
        holder = self._keys.holder(head.headers.get(b"authorization", b""))
        if holder is None and not (head.only_reads and head.path in self._open_paths):
            raise ApiError(
                401,
                "give an API key of this server: Authorization: Bearer ...",
                "authentication_error",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return holder or head.client

    async def _tell(self, error: ApiError, answer: _Answer) -> None:
        """Tells the client, if it has not been told anything yet."""
        self._telemetry.failed(error)
        if answer.status:
            return
        await send_error(error, answer)


class _Answer:
    """Sends the answer with the headers that every one has, and remembers its status."""

    def __init__(self, send: Send, id: str | None) -> None:
        self._send = send
        self._headers = [(b"x-content-type-options", b"nosniff")]
        if id is not None:
            self._headers.append((b"x-request-id", id.encode()))
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            names = {name.lower() for name, _ in headers}
            own = [*self._headers, (b"cache-control", b"no-store")]
            headers += [(name, value) for name, value in own if name not in names]
            message = {**message, "headers": headers}
        await self._send(message)


class _Counted:
    """Receives a body up to its limit; raises ApiError with the byte that is too much."""

    def __init__(self, receive: Receive, head: _Head, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        announced = head.headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > max_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._max_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_bytes} bytes", code="request_too_large")


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
