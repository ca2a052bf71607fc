"""The stages at work for requests: batches across them, and sequences that come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
import torch

import hired
from hired.budget import Budget
from hired.engine import Sampling
from hired.errors import ConfigurationError, EngineDeadError, PromptError, UnreadableImageError
from hired.prompts import Message, about_one_image
from hired.types import Caption, Partitions, VisualTokens
from pipeline.serve.backend import Query
from pipeline.serve.workers import EncodeWorker, GenerateWorker, PartitionWorker
from tests.pipeline.serve.chats import SCENES
from tests.pipeline.serve.conftest import SETTINGS

PICTURE = (SCENES / "scene-001.jpg").read_bytes()
BUDGET = Budget(rate=0.2)
# Drawn wide, the model goes on for long: 75 tokens.
LONG = Query(about_one_image("Describe the image."), 100, (), Sampling(2.0, 1.0, 7))
SHORT = Query(about_one_image("Describe the image."), 2)


@pytest.fixture(scope="module")
def encoder() -> EncodeWorker:
    return EncodeWorker(SETTINGS.config())


@pytest.fixture(scope="module")
def generator() -> GenerateWorker:
    return GenerateWorker(SETTINGS.config())


@pytest.fixture(scope="module")
def partitions() -> Partitions:
    return hired.load("embedded", device="cpu").partition(PICTURE)


@pytest.fixture(scope="module")
def tokens(partitions: Partitions) -> VisualTokens:
    return hired.load("embedded", device="cpu", dtype="float32").encode([partitions], budget=BUDGET)[0]


class SlowEncoder:
    """Stands before the real one: notes the batches, and holds the first until ``release``."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.batches: list[tuple[int, Budget, str]] = []
        self.entered, self.release = threading.Event(), threading.Event()

    def encode(self, partitions: Sequence[Any], *, budget: Budget, policy: str) -> list[VisualTokens]:
        self.batches.append((len(partitions), budget, policy))
        self.entered.set()
        self.release.wait(60)
        if any(image is None for image in partitions):
            raise RuntimeError("one of these")
        tokens: list[VisualTokens] = self._encoder.encode(partitions, budget=budget, policy=policy)
        return tokens


@pytest.fixture
def slow(encoder: EncodeWorker, monkeypatch: pytest.MonkeyPatch) -> SlowEncoder:
    stand_in = SlowEncoder(encoder._encoder)
    monkeypatch.setattr(encoder, "_encoder", stand_in)
    return stand_in


async def first_and_others(
    worker: EncodeWorker, slow: SlowEncoder, others: Sequence[tuple[Any, Budget, str]]
) -> list[Any]:
    """What the others get that arrive while the worker is busy with a first one."""
    first = asyncio.create_task(worker.encode(*others[0]))
    await asyncio.to_thread(slow.entered.wait, 60)
    waiting = [asyncio.create_task(worker.encode(*other)) for other in others]
    await asyncio.sleep(0)
    slow.release.set()
    await first
    return await asyncio.gather(*waiting, return_exceptions=True)


def test_images_that_arrive_while_one_is_encoded_share_the_next_batch(
    encoder: EncodeWorker, slow: SlowEncoder, partitions: Partitions, tokens: VisualTokens
) -> None:
    results = asyncio.run(first_and_others(encoder, slow, [(partitions, BUDGET, "hired")] * 5))
    assert [size for size, _, _ in slow.batches] == [1, 5]
    for result in results:
        assert torch.equal(result.patch, tokens.patch)
        assert torch.allclose(result.features, tokens.features, atol=1e-4)


def test_those_that_keep_otherwise_have_a_pass_of_their_own(
    encoder: EncodeWorker, slow: SlowEncoder, partitions: Partitions
) -> None:
    few = Budget(tokens=5)
    ways = [(partitions, BUDGET, "hired"), (partitions, few, "hired"), (partitions, BUDGET, "keep-all")] * 2
    results = asyncio.run(first_and_others(encoder, slow, ways))
    assert [size for size, _, _ in slow.batches] == [1, 2, 2, 2]
    assert len(results[1]) == len(results[4]) == 5
    assert len(results[2]) == results[2].num_before


def test_one_that_cannot_be_encoded_spoils_no_others(
    encoder: EncodeWorker, slow: SlowEncoder, partitions: Partitions
) -> None:
    good = (partitions, BUDGET, "hired")
    results = asyncio.run(first_and_others(encoder, slow, [good, (None, BUDGET, "hired"), good]))
    assert [type(result) for result in results] == [VisualTokens, RuntimeError, VisualTokens]
    encoder.check_health()


def test_whoever_does_not_wait_is_not_encoded(
    encoder: EncodeWorker, slow: SlowEncoder, partitions: Partitions
) -> None:
    async def impatient() -> None:
        first = asyncio.create_task(encoder.encode(partitions, BUDGET, "hired"))
        await asyncio.to_thread(slow.entered.wait, 60)
        gone = asyncio.create_task(encoder.encode(partitions, BUDGET, "hired"))
        stays = asyncio.create_task(encoder.encode(partitions, BUDGET, "hired"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        slow.release.set()
        await asyncio.gather(first, stays)

    asyncio.run(impatient())
    assert [size for size, _, _ in slow.batches] == [1, 1]


def test_a_device_that_failed_makes_the_worker_ill(
    partitions: Partitions, encoder: EncodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(encoder, "_encoder", Broken())
    monkeypatch.setattr(encoder, "_error", None)
    with pytest.raises(EngineDeadError):
        asyncio.run(encoder.encode(partitions, BUDGET, "hired"))
    with pytest.raises(EngineDeadError):
        encoder.check_health()


def test_an_unknown_policy_and_an_unknown_layer_are_configuration_errors(
    encoder: EncodeWorker, partitions: Partitions
) -> None:
    with pytest.raises(ConfigurationError, match="no policy"):
        asyncio.run(encoder.encode(partitions, BUDGET, "none such"))
    with pytest.raises(ConfigurationError, match="layers"):
        asyncio.run(encoder.attention(partitions, [99]))
    maps = asyncio.run(encoder.attention(partitions, [0, 5]))
    assert list(maps) == [0, 5]
    assert {len(attention) for attention in maps.values()} == {partitions.grid.num_partitions}


def test_partitions_come_from_a_process_of_their_own(partitions: Partitions) -> None:
    worker = PartitionWorker(SETTINGS.config())
    assert (asyncio.run(worker.partition(PICTURE)).pixels == partitions.pixels).all()
    with pytest.raises(UnreadableImageError):
        asyncio.run(worker.partition(b"no image"))


# Answers


async def whole(stream: AsyncGenerator[str | Caption, None]) -> tuple[str, Caption]:
    said = [each async for each in stream]
    assert isinstance(said[-1], Caption)
    return "".join(each for each in said if isinstance(each, str)), said[-1]


def test_answers_to_several_requests_run_together(generator: GenerateWorker, tokens: VisualTokens) -> None:
    async def together() -> int:
        streams = [generator.stream(LONG, [tokens]) for _ in range(4)]
        for stream in streams:
            await anext(stream)
        running = generator.load().running
        alone = await whole(generator.stream(SHORT, [tokens]))
        assert alone[1].completion_tokens == 2
        texts = {caption.text for _, caption in [await whole(stream) for stream in streams]}
        assert len(texts) == 1
        return running

    assert asyncio.run(together()) == 4


def test_an_answer_that_is_closed_leaves_the_batch(generator: GenerateWorker, tokens: VisualTokens) -> None:
    """The short one that comes after it ends first, so without being cancelled it would still run."""

    async def leave() -> int:
        stream = generator.stream(LONG, [tokens])
        await anext(stream)
        assert generator.load().running == 1
        await stream.aclose()
        await whole(generator.stream(SHORT, [tokens]))
        return generator.load().running

    assert asyncio.run(leave()) == 0


def test_texts_join_to_the_caption_and_may_be_left_out(
    generator: GenerateWorker, tokens: VisualTokens
) -> None:
    query = Query(about_one_image("Describe the image."), 40, (" sign",))
    text, caption = asyncio.run(whole(generator.stream(query, [tokens])))
    assert text == caption.text
    assert asyncio.run(whole(generator.stream(query, [tokens], in_parts=False))) == ("", caption)


def test_with_many_streams_several_tokens_travel_as_one(
    generator: GenerateWorker, tokens: VisualTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first text comes at once, the others together at the end: there is time for no more."""
    monkeypatch.setattr(generator, "_parts_per_s", 1e-3)

    async def said() -> list[str | Caption]:
        return [
            each
            async for each in generator.stream(Query(about_one_image("Describe the image."), 20), [tokens])
        ]

    first, rest, caption = asyncio.run(said())
    assert isinstance(caption, Caption)
    assert isinstance(first, str)
    assert isinstance(rest, str)
    assert caption.text.startswith(first)
    assert len(first) < len(rest)
    assert first + rest == caption.text


def test_a_prompt_about_other_images_is_the_callers_error(
    generator: GenerateWorker, tokens: VisualTokens
) -> None:
    for conversation, images in (
        (about_one_image("What?"), []),
        ((Message("user", ("What?",)),), [tokens]),
        ((Message("user", (None, "Is this an <image>?")),), [tokens]),
    ):
        with pytest.raises(PromptError):
            asyncio.run(whole(generator.stream(Query(conversation), images)))


def test_a_dead_engine_ends_answers_and_makes_the_worker_ill(
    tokens: VisualTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = GenerateWorker(SETTINGS.config())
    generator.check_health()
    engine: Any = generator._generator.engine

    async def break_down() -> None:
        stream = generator.stream(LONG, [tokens])
        await anext(stream)

        def fail() -> None:
            raise torch.AcceleratorError("device-side assert")

        monkeypatch.setattr(engine.engine, "step", fail)
        with pytest.raises(EngineDeadError):
            await whole(stream)

    asyncio.run(break_down())
    with pytest.raises(EngineDeadError):
        generator.check_health()
    with pytest.raises(EngineDeadError):
        asyncio.run(whole(generator.stream(SHORT, [tokens])))
