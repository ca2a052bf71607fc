"""OpenAI's chat completions, as they are asked for.

What would change the answer and is not supported is an error, also where OpenAI knows it; what would not is
accepted. Parameters that do nothing at their neutral values are accepted at those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from hired.prompts import Conversation, Message
from pipeline.config import TokenBudget
from pipeline.serve.api_error import ApiError, invalid

MAX_STOPS = 4


class Body(BaseModel):
    """A part of the request's JSON: no unknown keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(Body):
    """Where an image is, and how closely to look at it."""

    url: str = Field(description="a data: URI in base64, or an https URL of an allowed host")
    detail: Literal["auto", "low", "high"] | None = Field("auto", description="picks the token budget")


class ImagePart(Body):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Body):
    """A text in a message."""

    type: Literal["text"]
    text: str


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]
AnyPart = TypeVar("AnyPart")
# A text or a list of parts; errors are those of the one that was meant.
Content: TypeAlias = Annotated[
    Annotated[str, Tag("=text")] | Annotated[list[AnyPart], Field(min_length=1), Tag("=parts")],
    Discriminator(lambda value: "=parts" if isinstance(value, list) else "=text"),
]


class UserMessage(Body):
    """What the user says and shows."""

    role: Literal["user"]
    content: Content[Part]


class SystemMessage(Body):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: Content[TextPart]


class AssistantMessage(Body):
    """What was answered before; what else an answer's message holds must be empty."""

    role: Literal["assistant"]
    content: Content[TextPart]
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


AnyMessage: TypeAlias = Annotated[UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_usage: bool | None = Field(None, description="one more chunk at the end, with the usage")
    include_obfuscation: bool | None = Field(None, description="accepted, and not done")


class HiredOptions(Body):
    """How many visual tokens are kept, and which; overrides ``detail``."""

    token_budget: TokenBudget | None = Field(
        None,
        description="visual tokens of each image: a rate with a decimal point (0.2), or a number (576)",
        json_schema_extra={
            "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}, {"type": "null"}]
        },
    )
    policy: str | None = Field(None, description="which visual tokens to keep")
    alpha: float | None = Field(None, ge=0, le=1, description="the full-image's share of the budget")


class ResponseFormat(Body):
    """Only text."""

    type: Literal["text"]


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(Body):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[AnyMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="tokens of the answer at most")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="the same; this one counts"
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the default, always takes the likeliest token"
    )
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same answer")
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(max_length=MAX_STOPS),
            BeforeValidator(_texts),
        ]
        | None
    ) = Field(None, description="texts before which the answer ends: one or a list")
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    hired: HiredOptions | None = None

    # At these values they do nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    # They change nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def limit(self) -> int | None:
        """The tokens that the answer may have."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def conversation(self) -> Conversation:
        """The messages without their images' addresses."""
        return tuple(
            Message(
                "system" if message.role == "developer" else message.role,
                (message.content,)
                if isinstance(message.content, str)
                else tuple(None if isinstance(part, ImagePart) else part.text for part in message.content),
            )
            for message in self.messages
        )

    def images(self) -> Iterator[tuple[str, ImageUrl]]:
        """Where each image stands in the request, and what it is, in the order of the conversation."""
        for row, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for number, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield f"messages[{row}].content[{number}]", part.image_url


def parsed(body: bytes) -> ChatRequest:
    """The request; raises ApiError that names the first thing wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


_WORDS = {
    "json_invalid": ("the body is not JSON", "invalid_json"),
    "extra_forbidden": ("is not supported", "unknown_parameter"),
    "missing": ("is required", "missing_required_parameter"),
}


def _explained(error: ValidationError) -> ApiError:
    """The first error of the deepest, since a part that is neither text nor image is wrong in both ways."""
    [first, *_] = sorted(
        error.errors(include_url=False, include_input=False, include_context=False),
        key=lambda each: -len(_path(each["loc"])),
    )
    param = _path(first["loc"])
    words, code = _WORDS.get(first["type"], (first["msg"].removeprefix("Value error, "), "invalid_value"))
    if first["type"] == "json_invalid":
        return ApiError(400, words, code=code)
    message = f"{param} {words}" if first["type"] in _WORDS else f"{param or 'the body'}: {words}"
    return invalid(message, param or None, code)


# Names of the alternatives, which pydantic puts between the keys.
_ALTERNATIVES = frozenset({"user", "system", "developer", "assistant", "text", "image_url"})


def _path(loc: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].image_url.url``, as OpenAI writes it."""
    path = ""
    for number, part in enumerate(loc):
        if isinstance(part, int):
            path += f"[{part}]"
        elif _is_key(part, loc[:number]):
            path += f".{part}" if path else part
    return path


def _is_key(part: str, before: tuple[int | str, ...]) -> bool:
    """Whether it is a key of the JSON: after an index the name of an alternative comes first."""
    if before and isinstance(before[-1], int) and part in _ALTERNATIVES:
        return False
    return part.isidentifier()


def schema() -> dict[str, Any]:
    """The JSON schema of the body, with its parts among OpenAPI's components."""
    return ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
