"""What is told of a growing answer is never taken back, and joins to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from hired import embedded
from hired.prompts import PromptTemplate
from pipeline.serve.deltas import TextStream
from tests.tiny import IMAGE_ID, tiny_llava_next

BYTES = st.lists(st.integers(0, 255), max_size=40)


def as_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def whole(text: str, stop: Sequence[str]) -> str:
    """As the generator makes a caption of an answer's text."""
    for each in stop:
        text = text.partition(each)[0]
    return text.strip()


def test_characters_of_several_tokens_are_told_when_they_are_complete() -> None:
    stream = TextStream(as_bytes)
    assert [stream.add(byte) for byte in "漢a".encode()] == ["", "", "漢", "a"]


def test_the_beginning_of_a_stop_string_waits_until_it_is_known_to_be_none() -> None:
    stream = TextStream(as_bytes, ["###"])
    assert [stream.add(byte) for byte in b"a##b##"] == ["a", "", "", "##b", "", ""]
    assert stream.finish("a##b##") == "##"


def test_blanks_at_both_ends_are_not_told() -> None:
    stream = TextStream(as_bytes)
    assert [stream.add(byte) for byte in b"  a b "] == ["", "", "a", "", " b", ""]
    assert stream.finish("a b") == ""


@given(BYTES, st.lists(st.text("ab#\n é", min_size=1, max_size=4), max_size=2))
def test_whatever_the_bytes_texts_join_to_the_whole(ids: list[int], stop: list[str]) -> None:
    joins(as_bytes, ids, stop)


@given(
    st.lists(st.sampled_from(list("ab# \né漢".encode())), max_size=40),
    st.lists(st.text("ab# é", min_size=1, max_size=3), max_size=3),
)
def test_so_they_do_where_stop_strings_are_frequent(ids: list[int], stop: list[str]) -> None:
    joins(as_bytes, ids, stop)


@pytest.fixture(scope="module")
def tokenisers(tmp_path_factory: pytest.TempPathFactory) -> list[PromptTemplate]:
    folders = [(embedded.CHECKPOINT, 3), (tiny_llava_next(tmp_path_factory.mktemp("tiny")), IMAGE_ID)]
    return [PromptTemplate(_processor(folder), image_id) for folder, image_id in folders]


def _processor(folder: Path) -> object:
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


@given(st.lists(st.integers(0, 250), max_size=60))
def test_so_they_do_with_real_tokenisers(tokenisers: list[PromptTemplate], ids: list[int]) -> None:
    for prompts in tokenisers:
        joins(prompts.decode, ids, ["e", "st"])


def joins(decode: object, ids: Sequence[int], stop: Sequence[str]) -> None:
    """As the engine does, the answer ends with the token that completes a stop string."""
    assert callable(decode)
    stream, told, taken = TextStream(decode, stop), "", []
    for token_id in ids:
        taken.append(token_id)
        told += stream.add(token_id)
        if any(each in decode(taken) for each in stop):
            break
    text = whole(decode(taken), stop)
    assert told + stream.finish(text) == text
