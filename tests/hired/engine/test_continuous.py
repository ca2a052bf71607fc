"""Sequences that join, leave, are cancelled and begin again: none of it shows in another's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hired.engine import GREEDY, Completion, Request, Sampling
from hired.engine import continuous as continuous_engine
from hired.engine.continuous import ContinuousEngine
from hired.engine.decoder import Attend
from hired.errors import CapacityError, ConfigurationError
from tests.language_models import VOCABULARY, completed, continuous, prefixed, request

KINDS = [(3, 7), (17, 2), (1, 12), (9, 12), (40, 5), (26, 9)]  # prompt lengths and new tokens at most
DRAWN = Sampling(temperature=1.2, top_p=0.9, seed=5)


def asked(kind: int) -> Request:
    length, max_new_tokens = KINDS[kind % len(KINDS)]
    return request(length, max_new_tokens=max_new_tokens, sampling=DRAWN if kind % 2 else GREEDY, seed=kind)


@cache
def alone(kind: int, eos_token_id: int) -> Completion:
    [answer] = continuous(eos_token_ids=[eos_token_id]).generate([asked(kind)])
    assert isinstance(answer, Completion)
    return answer


def engine_of(places: int, prefill_tokens: int, **options: Any) -> ContinuousEngine:
    """An engine whose cache has so many places, so that sequences wait for each other."""
    per_token = continuous().decoder.shape.kv_bytes_per_token
    return continuous(kv_cache_bytes=places * per_token, prefill_tokens=prefill_tokens, **options)


def run(engine: ContinuousEngine) -> dict[int, Completion]:
    outcomes = {}
    while engine.has_work:
        for event in engine.step():
            if event.outcome is not None:
                assert isinstance(event.outcome, Completion), event.outcome
                outcomes[event.index] = event.outcome
    return outcomes


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=1, max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    places=st.integers(64, 300),
    prefill_tokens=st.sampled_from([4, 16, 1000]),
    eos_token_id=st.sampled_from([7, 40]),
)
def test_every_answer_is_the_one_given_alone(
    arrivals: list[tuple[int, int]], cancelled: set[int], places: int, prefill_tokens: int, eos_token_id: int
) -> None:
    """Requests arrive between passes, some are cancelled on the way, prompts are cut into pieces."""
    engine = engine_of(places, prefill_tokens, eos_token_ids=[eos_token_id])
    before = engine.counts
    kinds: dict[int, int] = {}
    outcomes: dict[int, Completion] = {}
    gone = set()
    for number, (kind, num_steps) in enumerate(arrivals):
        kinds[engine.submit(asked(kind))] = kind
        for _ in range(num_steps):
            outcomes |= {e.index: e.outcome for e in engine.step() if isinstance(e.outcome, Completion)}
        if number in cancelled:
            engine.cancel(number)
            gone |= {number} - outcomes.keys()
    outcomes |= run(engine)

    assert outcomes == {h: alone(kind, eos_token_id) for h, kind in kinds.items() if h not in gone}
    assert engine.counts == before


def test_ten_thousand_sequences_leak_no_place() -> None:
    engine = engine_of(700, 64, eos_token_ids=[3])
    before = engine.counts

    def many() -> Iterator[Request]:
        for i in range(10_000):
            yield request(1 + i % 5, max_new_tokens=1 + i % 3, seed=i % 50)

    answers = engine.generate(many())
    assert len(completed(answers)) == 10_000
    assert engine.counts == before
    assert engine.cache.arena.num_held == 0


def test_requests_are_taken_only_when_there_is_room() -> None:
    engine = engine_of(128, 1000)  # two extents
    taken = []

    def many() -> Iterator[Request]:
        for i in range(6):
            taken.append(i)
            yield request(9, seed=i)

    stream = engine.stream(many())
    next(stream)
    assert len(taken) <= 3  # two that run, and one that waits
    assert len([event for event in stream if event.outcome]) == 6


def test_what_never_fits_is_refused_and_the_others_are_served() -> None:
    engine = engine_of(40, 1000)
    answers = engine.generate([request(20), request(30, max_new_tokens=12), request(29, max_new_tokens=12)])

    assert isinstance(answers[1], CapacityError)
    assert "41 places" in str(answers[1])
    assert completed([answers[0], answers[2]]) == completed(
        continuous().generate([request(20), request(29, max_new_tokens=12)])
    )


def test_a_prefix_computed_once_changes_no_token() -> None:
    ids = (5, 9, 70)
    engine = continuous()
    own = [prefixed(request(n, gap=3), ids, engine.decoder.embed) for n in (9, 4, 9, 30)]
    repeated = [own[0], *own, own[3]]
    expected = [completed(continuous().generate([one]))[0] for one in repeated]

    first = engine.generate(repeated[:1])
    assert completed([*first, *engine.generate(repeated[1:])]) == expected


def test_a_known_prefix_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tuple(range(10, 30))
    engine = continuous()
    one = prefixed(request(4, max_new_tokens=1), ids, engine.decoder.embed)
    num_tokens = _counted(engine, monkeypatch)
    engine.generate([one])
    engine.generate([one])
    assert num_tokens == [24, 4]


def test_a_long_answer_does_not_bring_back_the_prefix_that_was_given_up_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(continuous_engine, "MAX_PREFIXES", 1)
    engine = continuous()
    embed = engine.decoder.embed
    long = prefixed(request(4, max_new_tokens=9), tuple(range(10, 30)), embed)
    other = prefixed(request(4, max_new_tokens=1), tuple(range(40, 60)), embed)
    num_tokens = _counted(engine, monkeypatch)

    for one in (long, other, other):
        engine.submit(one)
        engine.step()
        engine.step()
    assert num_tokens == [24, 1, 1 + 24, 1, 1 + 4, 1]


def test_the_prefix_that_is_in_use_is_the_last_to_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_engine, "MAX_PREFIXES", 2)
    engine = continuous()
    one, two, three = (
        prefixed(request(4, max_new_tokens=1), tuple(range(first, first + 20)), engine.decoder.embed)
        for first in (10, 30, 50)
    )
    num_tokens = _counted(engine, monkeypatch)

    for asked in (one, two, one, three, one):
        engine.generate([asked])
    assert num_tokens == [24, 24, 4, 24, 4]


def _counted(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass from now on."""
    num_tokens: list[int] = []
    forward = engine.decoder.forward

    def counted(embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        num_tokens.append(len(embeddings))
        return forward(embeddings, positions, attend)

    monkeypatch.setattr(engine.decoder, "forward", counted)
    return num_tokens


def test_closing_a_stream_cancels_what_runs() -> None:
    engine = continuous()
    before = engine.counts
    stream = engine.stream([request(9), request(3)])
    next(stream)
    stream.close()  # type: ignore[attr-defined]

    assert not engine.has_work
    assert engine.counts == before


def test_one_stream_at_a_time() -> None:
    engine = continuous()
    engine.submit(request(9))
    with pytest.raises(ConfigurationError, match="in use"):
        engine.generate([request(3)])


def test_at_most_so_many_together_as_the_options_allow() -> None:
    engine = continuous(max_sequences=2)
    for kind in range(5):
        engine.submit(asked(kind))
    while engine.has_work:
        engine.step()
        assert engine.counts.num_running <= 2


def test_a_cache_without_memory_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="no memory is left"):
        continuous(kv_cache_bytes=1)


@pytest.mark.parametrize("limit", [60, 30, 16])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A device that has memory for ``limit`` tokens a pass."""
    kinds = [3, 9, 4, 10, 5, 11, 3, 9]
    expected = [alone(kind, 7) for kind in kinds]
    engine = continuous(eos_token_ids=[7])
    before = engine.counts
    failures = out_of_memory_beyond(engine, monkeypatch, lambda tokens: tokens > limit)

    assert engine.generate([asked(kind) for kind in kinds]) == expected
    assert failures
    assert engine.counts == before


def test_answers_begun_before_memory_ran_out_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = continuous()
    whole = [continuous().generate([request(n)])[0] for n in (9, 3, 17)]
    for n in (9, 3, 17):
        engine.submit(request(n))
    for _ in range(5):
        engine.step()
    failures = out_of_memory_beyond(engine, monkeypatch, lambda tokens: tokens == 3)  # all three decode

    outcomes: list[Any] = [None] * 3
    while engine.has_work:
        for event in engine.step():
            outcomes[event.index] = event.outcome or outcomes[event.index]
    assert outcomes == whole
    assert failures


def test_a_prompt_that_has_no_memory_even_alone_is_refused_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = continuous()
    broken = request(5)
    broken.embeddings[0, 0] = 1234.0

    forward = engine.decoder.forward

    def failing(embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if (embeddings == 1234.0).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(embeddings, positions, attend)

    monkeypatch.setattr(engine.decoder, "forward", failing)
    answers = engine.generate([request(9), broken, request(17)])
    assert isinstance(answers[1], CapacityError)
    assert completed([answers[0], answers[2]]) == completed(continuous().generate([request(9), request(17)]))


def out_of_memory_beyond(
    engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]
) -> list[int]:
    """Makes passes of some numbers of tokens fail, and gives the list where they will be noted."""
    forward = engine.decoder.forward
    failures: list[int] = []

    def failing(embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if fails(len(embeddings)):
            failures.append(len(embeddings))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(embeddings, positions, attend)

    monkeypatch.setattr(engine.decoder, "forward", failing)
    return failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_are_complete(dtype: torch.dtype) -> None:
    answers = completed(continuous(dtype=dtype).generate([asked(kind) for kind in range(6)]))
    assert [len(ids) for ids in answers] == [limit for _, limit in KINDS]
    assert all(0 <= token_id < VOCABULARY for ids in answers for token_id in ids)
