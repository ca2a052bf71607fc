"""Requests are read strictly, and what is wrong is named as OpenAI names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hired.prompts import Message
from pipeline.serve.api_error import ApiError
from pipeline.serve.requests import ChatRequest, parsed
from tests.pipeline.serve.chats import PICTURE, asked, image_part


def read(**changes: Any) -> ChatRequest:
    return parsed(json.dumps(asked(PICTURE) | changes).encode())


def refused(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        read(**changes)
    assert raised.value.status == 400
    return raised.value


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def test_a_conversation_keeps_the_order_of_texts_and_images() -> None:
    request = read(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [image_part(PICTURE), {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A fox."},
            {"role": "user", "content": [{"type": "text", "text": "And"}, image_part(PICTURE, "high")]},
        ]
    )
    assert request.conversation() == (
        Message("system", ("Be brief.",)),
        Message("user", (None, "What?")),
        Message("assistant", ("A fox.",)),
        Message("user", ("And", None)),
    )
    assert [(param, image.detail) for param, image in request.images()] == [
        ("messages[1].content[0]", "auto"),
        ("messages[3].content[1]", "high"),
    ]


@pytest.mark.parametrize(
    "neutral",
    [
        {"user": "somebody", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
        },
        {"temperature": None, "top_p": None, "seed": None, "stop": None, "stream": None, "max_tokens": None},
        {
            "modalities": ["text"],
            "reasoning_effort": "none",
            "prediction": {"type": "content", "content": "a"},
        },
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_what_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    read(**neutral)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include": True}}, "stream_options.include"),
        ({"hired": {"token_budget": 1}}, "hired.token_budget"),
        ({"hired": {"token_budget": 1.5}}, "hired.token_budget"),
        ({"hired": {"alpha": 2}}, "hired.alpha"),
        ({"hired": {"rate": 0.2}}, "hired.rate"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "system", "content": [image_part(PICTURE)]}]}, "messages[0].content[0].type"),
        ({"messages": user({"type": "text", "text": "a"}, {"type": "video_url"})}, "messages[0].content[1]"),
        ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url"),
        ({"messages": user({"type": "image_url", "image_url": "data:"})}, "messages[0].content[0].image_url"),
        ({"messages": user({"type": "image_url", "image_url": {}})}, "messages[0].content[0].image_url.url"),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "a", "detail": "best"}})},
            "messages[0].content[0].image_url.detail",
        ),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    error = refused(**changes)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"5", b'"a"', b"\xff\xfe", b'{"model": 1}', b"[" * 9999]
)
def test_bodies_that_are_no_requests_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parsed(body)
    assert raised.value.status == 400


def test_messages_of_earlier_answers_can_be_sent_back_as_they_came() -> None:
    answer = {
        "role": "assistant",
        "content": "A fox.",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    request = read(messages=[*asked(PICTURE)["messages"], answer, {"role": "user", "content": "Where?"}])
    assert len(request.conversation()) == 3


def test_the_newer_of_two_limits_counts() -> None:
    assert read(max_tokens=5).limit == 5
    assert read(max_tokens=5, max_completion_tokens=7).limit == 7
    assert read().limit is None


def test_all_tokens_can_be_asked_for_from_languages_whose_numbers_have_no_decimal_point() -> None:
    options = read(hired={"token_budget": "1.0"}).hired
    assert options is not None
    assert options.token_budget == 1.0
    assert type(options.token_budget) is float
