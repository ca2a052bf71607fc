"""OpenAI's chat completions, as they are answered: whole, or in chunks of a server-sent stream."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

from hired.types import Caption
from pipeline.serve.api_error import ApiError

DONE = b"data: [DONE]\n\n"


class Usage(BaseModel):
    """What the answer cost. ``prompt_tokens`` holds the visual tokens that were kept."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens_full: int = Field(description="visual tokens of all images before dropping")
    visual_tokens_kept: int = Field(description="visual tokens that the language model was given")


class AnswerMessage(BaseModel):
    """What is answered."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hired"


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """A failure, in OpenAI's shape."""

    error: ErrorBody


def usage(caption: Caption) -> Usage:
    """What a caption cost."""
    return Usage(
        prompt_tokens=caption.prompt_tokens,
        completion_tokens=caption.completion_tokens,
        total_tokens=caption.prompt_tokens + caption.completion_tokens,
        visual_tokens_full=caption.visual_tokens_full,
        visual_tokens_kept=caption.visual_tokens_kept,
    )


def completion(id: str, created: int, model: str, caption: Caption) -> ChatCompletion:
    """A whole answer."""
    choice = Choice(message=AnswerMessage(content=caption.text), finish_reason=caption.finish_reason)
    return ChatCompletion(id=id, created=created, model=model, choices=[choice], usage=usage(caption))


class Chunks:
    """The events of one streamed answer; with ``with_usage`` each says null for it and one more tells it."""

    def __init__(self, id: str, created: int, model: str, *, with_usage: bool) -> None:
        self._head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._usage: dict[str, Any] = {"usage": None} if with_usage else {}

    def first(self) -> bytes:
        """Who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def text(self, delta: str) -> bytes:
        """Some more text."""
        return self._chunk({"content": delta}, None)

    def end(self, caption: Caption) -> bytes:
        """Why the answer ended, what it cost if that is wanted, and that nothing follows."""
        last = self._chunk({}, caption.finish_reason)
        if self._usage:
            last += event(self._head | {"choices": [], "usage": usage(caption).model_dump()})
        return last + DONE

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self._head | {"choices": [choice]} | self._usage)


def failed(error: ApiError) -> bytes:
    """A stream's end in the middle of the answer."""
    return event(error.body) + DONE


def event(data: dict[str, Any]) -> bytes:
    """One event of the stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
