"""What a client is told when a request fails: our own words, the right status.

Messages of ``HiredError`` are written for whoever caused them and are passed on. Any other exception may hold
paths, addresses or a library's internals: it goes to the log, and the client gets the request's id.
"""

from __future__ import annotations

import logging

from hired.errors import (
    CapacityError,
    EngineDeadError,
    HiredError,
    ImageError,
    ImageTooLargeError,
    PromptError,
)
from pipeline.fetching import BodyTooLargeError, FetchError, UnsafeUrlError
from pipeline.isolation import ImageTimeoutError, WorkerDiedError
from pipeline.serve.api_error import SERVER, ApiError, come_back, invalid
from pipeline.serve.backend import UnavailableError

log = logging.getLogger(__name__)


def of_image(error: Exception, param: str) -> ApiError | None:
    """What an image's own error says of the part that holds it; None for errors of other kinds."""
    match error:
        case ImageTimeoutError():
            return invalid("decoding the image took too long", param, "image_timeout")
        case ImageTooLargeError():
            return invalid(str(error), param, "image_too_large")
        case ImageError():
            return invalid(str(error), param, "invalid_image")
        case WorkerDiedError():
            return invalid("decoding the image ended the decoder's process", param, "invalid_image")
        case UnsafeUrlError():
            return invalid(
                "this URL is not opened: give a data: URI, or an https URL of a host that this server allows",
                param,
                "unsafe_url",
            )
        case BodyTooLargeError():
            return invalid("the image behind the URL is larger than allowed", param, "image_too_large")
        case FetchError():
            return invalid(f"the image behind the URL cannot be had: {error}", param, "image_not_fetched")
        case _:
            return None


def of(error: Exception, retry_after_s: float = 1) -> ApiError:
    """What any error is to the client."""
    match error:
        case ApiError():
            return error
        case CapacityError():
            return invalid(str(error), "messages", "context_length_exceeded")
        case PromptError():
            return invalid(str(error), "messages")
        case EngineDeadError() | UnavailableError():
            message = "the model is not available just now; try again"
            return come_back(503, message, SERVER, "unavailable", retry_after_s)
        case TimeoutError():
            return ApiError(504, "the request took longer than this server allows", SERVER, "timeout")
        case HiredError():
            return ApiError(500, "the model failed on this request", SERVER, "model_error")
        case _:
            return ApiError(500, "internal error; the server's log has it under this request's id", SERVER)


def logged(error: Exception, retry_after_s: float = 1) -> ApiError:
    """The same; what is nobody's fault outside is written to the log with all that is known of it."""
    explained = of(error, retry_after_s)
    if explained.status >= 500 and not isinstance(error, ApiError | TimeoutError):
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
    return explained
