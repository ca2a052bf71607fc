"""The endpoint's door in Ray Serve's own proxy: whoever is too many is sent away right there.

The gate in the application does the same. But to carry a request there and its refusal back takes the time of
two more processes, on cores that they share with the requests that were let in. A proxy calls ``middlewares``
at its start where the environment names it. Imports nothing heavy: a proxy needs no models.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from contextlib import nullcontext

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from hired.errors import ConfigurationError
from pipeline.serve.admission import Admission
from pipeline.serve.api_error import send_error

IN_FLIGHT, RETRY_AFTER_S = "HIRED_IN_FLIGHT", "HIRED_RETRY_AFTER_S"
# In the scope of a request: how many were turned away since the one before.
TURNED_AWAY = "hired.turned_away"

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def id_of(headers: Mapping[bytes, bytes]) -> str:
    """A request's id: the client's own, where that can stand in a log."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex


def environment(in_flight: int, retry_after_s: float) -> Mapping[str, str]:
    """What to put into the environment of Ray's processes, so that their proxies have this door."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.{middlewares.__name__}",
        IN_FLIGHT: str(in_flight),
        RETRY_AFTER_S: str(retry_after_s),
    }


def middlewares() -> list[Middleware]:
    """For Ray Serve: the door that the environment describes; raises ConfigurationError if it does not."""
    try:
        number, seconds = int(os.environ[IN_FLIGHT]), float(os.environ[RETRY_AFTER_S])
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"the door of Ray Serve's proxies needs {IN_FLIGHT}, a number of requests, and {RETRY_AFTER_S}, "
            f"in the environment of Ray's nodes ({type(error).__name__}: {error})"
        ) from error
    return [Middleware(Door, in_flight=number, retry_after_s=seconds)]


class Door:
    """The proxy behind a limit of requests at once; those that only read pass always."""

    def __init__(self, app: ASGIApp, *, in_flight: int, retry_after_s: float) -> None:
        self._app, self._admission = app, Admission(in_flight, retry_after_s)
        self._num_turned_away = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or send away."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        only_reads = scope["method"] in ("GET", "HEAD")
        refusal = None if only_reads else self._admission.refusal
        if refusal is not None:
            self._num_turned_away += 1
            await send_error(refusal, send, {"x-request-id": id_of(dict(scope["headers"]))})
            return
        scope[TURNED_AWAY], self._num_turned_away = self._num_turned_away, 0
        with nullcontext() if only_reads else self._admission:
            await self._app(scope, receive, send)
