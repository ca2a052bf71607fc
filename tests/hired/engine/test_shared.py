"""Several threads on one engine: each hears its own, whatever becomes of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hired.engine import Outcome, Request
from hired.engine.decoder import Attend
from hired.engine.shared import SharedEngine
from hired.errors import EngineDeadError
from tests.language_models import completed, continuous, request

TIMEOUT_S = 60


def asked(caller: int) -> list[Request]:
    return [request(1 + (7 * caller + i) % 23, max_new_tokens=3 + i % 9, seed=i) for i in range(8)]


def test_threads_that_share_an_engine_get_the_answers_they_get_alone() -> None:
    expected = [continuous().generate(asked(caller)) for caller in range(6)]
    shared = SharedEngine(continuous(kv_cache_bytes=2**17))
    before = shared.engine.counts
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda caller: shared.generate(asked(caller)), range(6)))

    assert answers == expected
    assert shared.engine.counts == before


def test_a_second_callers_requests_join_while_the_firsts_run() -> None:
    shared = SharedEngine(continuous())
    first = shared.stream([request(9, max_new_tokens=100)])
    next(first)
    assert len(completed(shared.generate([request(3)]))) == 1
    assert [event.outcome for event in first if event.outcome]


def test_a_listener_that_leaves_frees_its_places() -> None:
    shared = SharedEngine(continuous())
    before = shared.engine.counts
    stream = shared.stream([request(9, max_new_tokens=100), request(3, max_new_tokens=100)])
    next(stream)
    stream.close()  # type: ignore[attr-defined]

    answer = shared.generate([request(17)])
    assert answer == continuous().generate([request(17)])
    assert shared.engine.counts == before


def test_an_error_in_ones_own_requests_is_ones_own() -> None:
    def broken() -> Iterator[Request]:
        yield request(3)
        raise KeyError("no such prompt")

    shared = SharedEngine(continuous())
    other = shared.stream([request(9, max_new_tokens=40)])
    next(other)
    with pytest.raises(KeyError, match="no such prompt"):
        shared.generate(broken())
    assert [event.outcome for event in other if event.outcome]


def test_an_error_of_the_engine_reaches_every_caller_and_nobody_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = continuous()
    shared = SharedEngine(engine)
    forward = engine.decoder.forward
    both_run = threading.Barrier(2)

    def failing(embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if len(embeddings) == 2:  # both callers' sequences decode
            raise torch.AcceleratorError("device-side assert")
        return forward(embeddings, positions, attend)

    monkeypatch.setattr(engine.decoder, "forward", failing)

    def call(length: int) -> list[Outcome]:
        both_run.wait(TIMEOUT_S)
        return shared.generate([request(length, max_new_tokens=100)])

    with ThreadPoolExecutor(2) as threads:
        for call_made in [threads.submit(call, length) for length in (9, 3)]:
            with pytest.raises(EngineDeadError, match="AcceleratorError"):
                call_made.result(TIMEOUT_S)
    with pytest.raises(EngineDeadError, match="AcceleratorError"):
        shared.generate([request(3)])
