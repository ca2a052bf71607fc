"""What every engine promises, against transformers' own generate and a loop without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest
import torch
from torch import Tensor

from hired.engine import Completion, Engine, Request, Sampling
from hired.engine.fake import FakeEngine
from hired.errors import CapacityError, ConfigurationError, GenerationError
from tests.language_models import (
    MODELS,
    completed,
    continuous,
    decode,
    language_model,
    on_transformers,
    request,
    without_a_cache,
)

LENGTHS = [3, 17, 1, 9]


class NewEngine(Protocol):
    def __call__(self, name: str = "llama", *, eos_token_ids: Sequence[int] = ()) -> Engine: ...


@pytest.fixture(params=[continuous, on_transformers])
def engine(request: pytest.FixtureRequest) -> NewEngine:
    new_engine: NewEngine = request.param
    return new_engine


@pytest.mark.parametrize("family", MODELS)
def test_a_ragged_batch_equals_transformers_generate_prompt_by_prompt(engine: NewEngine, family: str) -> None:
    requests = [request(length) for length in LENGTHS]
    answers = completed(engine(family).generate(requests))

    model = language_model(family)
    for asked, answer in zip(requests, answers, strict=True):
        expected = model.generate(inputs_embeds=asked.embeddings[None], max_new_tokens=12, do_sample=False)
        assert answer == expected[0].tolist()
    assert len({tuple(answer) for answer in answers}) == len(LENGTHS)


@pytest.mark.parametrize("family", MODELS)
def test_positions_with_gaps_equal_a_loop_without_a_cache(engine: NewEngine, family: str) -> None:
    requests = [request(length, gap=gap) for length, gap in zip(LENGTHS, [0, 40, 7, 21], strict=True)]

    expected = [without_a_cache(language_model(family), asked) for asked in requests]
    assert completed(engine(family).generate(requests)) == expected


def test_gaps_in_the_positions_change_the_answer(engine: NewEngine) -> None:
    near, far = completed(engine().generate([request(17), request(17, gap=40)]))
    assert near != far


def test_each_request_ends_at_its_own_limit(engine: NewEngine) -> None:
    limits = [5, 1, 12, 3]
    requests = [request(n, max_new_tokens=limit) for n, limit in zip(LENGTHS, limits, strict=True)]
    alone = [completed(engine().generate([request(n)]))[0] for n in LENGTHS]

    answers = engine().generate(requests)
    assert completed(answers) == [ids[:limit] for ids, limit in zip(alone, limits, strict=True)]
    assert [answer.finish_reason for answer in answers if isinstance(answer, Completion)] == ["length"] * 4


def test_any_of_several_end_of_sequence_tokens_stops_and_is_left_out(engine: NewEngine) -> None:
    free = completed(engine().generate([request(n) for n in LENGTHS]))
    first, second = free[0][4], free[1][6]

    answers = engine(eos_token_ids=[first, second]).generate([request(n) for n in LENGTHS])
    for ids, answer in zip(free, answers, strict=True):
        end = next((i for i, token in enumerate(ids) if token in (first, second)), None)
        assert answer == Completion(tuple(ids[:end]), "length" if end is None else "stop")


def test_an_answer_may_be_empty(engine: NewEngine) -> None:
    first = completed(engine().generate([request(3)]))[0][0]
    assert engine(eos_token_ids=[first]).generate([request(3)]) == [Completion((), "stop")]


def test_a_stop_string_ends_its_own_answer_only(engine: NewEngine) -> None:
    free = completed(engine().generate([request(n) for n in LENGTHS]))
    stop = decode(free[0][4:6])
    answers = engine().generate([request(LENGTHS[0], stop=("never", stop)), request(LENGTHS[1])])

    text = decode(free[0])
    assert answers[0] == Completion(tuple(free[0][: text.index(stop) + len(stop)]), "stop")
    assert answers[1] == Completion(tuple(free[1]), "length")


def test_a_prompt_beyond_the_context_fails_alone(engine: NewEngine) -> None:
    fits, too_long, leaps = request(116), request(117), request(9, gap=110)
    answers = engine().generate([too_long, fits, leaps])

    assert isinstance(answers[0], CapacityError)
    assert "context holds 128" in str(answers[0])
    assert isinstance(answers[2], CapacityError)
    assert completed(answers[1:2]) == completed(engine().generate([fits]))


def test_scores_that_are_not_numbers_fail_their_row_only(engine: NewEngine) -> None:
    sound = request(9)
    broken = Request(torch.full((3, 32), torch.nan), torch.arange(3), 12)
    answers = engine().generate([broken, sound])

    assert isinstance(answers[0], GenerationError)
    assert completed(answers[1:]) == completed(engine().generate([sound]))


def test_no_requests_give_no_answers(engine: NewEngine) -> None:
    assert engine().generate([]) == []


def test_a_stream_tells_every_token_once_and_ends_every_request(engine: NewEngine) -> None:
    asked = [request(length, max_new_tokens=4 + length) for length in LENGTHS]
    expected = engine().generate(asked)
    events = list(engine().stream(asked))

    for index, outcome in enumerate(expected):
        own = [event for event in events if event.index == index]
        assert isinstance(outcome, Completion)
        assert tuple(event.token_id for event in own if event.token_id is not None) == outcome.token_ids
        assert [event.outcome for event in own if event.outcome is not None] == [own[-1].outcome] == [outcome]


def test_the_same_seed_draws_the_same_answer_in_any_company(engine: NewEngine) -> None:
    drawn = [request(9, sampling=Sampling(temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 2, 1)]
    together = completed(engine().generate([request(3), *drawn, request(17)]))[1:-1]

    assert together == [completed(engine().generate([one]))[0] for one in drawn]
    assert together[0] == together[2] != together[1]


def test_a_narrow_nucleus_is_greedy(engine: NewEngine) -> None:
    greedy = completed(engine().generate([request(9)]))
    assert completed(engine().generate([request(9, sampling=Sampling(1.0, top_p=1e-6))])) == greedy


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}])
def test_an_impossible_sampling_is_a_configuration_error(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("embeddings", "positions", "max_new_tokens", "stop"),
    [
        (torch.zeros(0, 4), torch.arange(0), 1, ()),
        (torch.zeros(3, 4), torch.arange(2), 1, ()),
        (torch.zeros(3, 4), torch.arange(3), 0, ()),
        (torch.zeros(3, 4), torch.arange(3), 1, ("",)),
    ],
)
def test_an_impossible_request_cannot_be_made(
    embeddings: Tensor, positions: Tensor, max_new_tokens: int, stop: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"disagree|at least 1|empty stop string"):
        Request(embeddings, positions, max_new_tokens, stop)


def test_the_fake_answers_by_its_script_and_keeps_the_requests() -> None:
    fake = FakeEngine(lambda asked: [7] * len(asked), max_positions=20)
    short, long, beyond = (
        request(2, max_new_tokens=4),
        request(9, max_new_tokens=4),
        request(17, max_new_tokens=4),
    )
    engine: Engine = fake
    answers = engine.generate([short, long, beyond])

    assert answers[:2] == [Completion((7, 7), "stop"), Completion((7, 7, 7, 7), "length")]
    assert isinstance(answers[2], CapacityError)
    assert fake.requests == [short, long, beyond]
