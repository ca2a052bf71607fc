"""A failure in OpenAI's shape. Imports nothing heavy, as Ray Serve's proxies hold it too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from starlette.types import Send

INVALID = "invalid_request_error"
SERVER = "server_error"


@dataclass(eq=False)
class ApiError(Exception):
    """A failure as the client gets it; ``param`` names what of the request is at fault."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The request itself is wrong."""
    return ApiError(400, message, INVALID, code, param)


def come_back(status: int, message: str, type: str, code: str, seconds: float) -> ApiError:
    """The request may do another time."""
    return ApiError(status, message, type, code, headers={"Retry-After": str(max(1, math.ceil(seconds)))})


async def send_error(error: ApiError, send: Send, more: Mapping[str, str] = MappingProxyType({})) -> None:
    """The error as a whole answer, with ``more`` headers."""
    body = json.dumps(error.body).encode()
    headers = (
        {"content-type": "application/json", "content-length": str(len(body))}
        | dict(error.headers)
        | dict(more)
    )
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
