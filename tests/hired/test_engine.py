"""The engine on transformers, against transformers' own generate and a loop without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from hired.engine import Completion, Engine, Request
from hired.engine.fake import FakeEngine
from hired.engine.transformers_engine import TransformersEngine
from hired.errors import CapacityError, GenerationError

FAMILIES = ["llama", "mistral"]
LENGTHS = [3, 17, 1, 9]
VOCABULARY = 90


@cache
def language_model(family: str) -> PreTrainedModel:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(11)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return MistralForCausalLM(MistralConfig(**shape, sliding_window=8)).eval()


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("!") + token_id) for token_id in token_ids)


def engine(family: str = "llama", eos_token_ids: Sequence[int] = ()) -> TransformersEngine:
    return TransformersEngine(language_model(family), eos_token_ids=eos_token_ids, decode=decode)


def request(length: int, *, max_new_tokens: int = 12, gap: int = 0, stop: tuple[str, ...] = ()) -> Request:
    """A prompt of random embeddings whose positions leap by ``gap`` in the middle."""
    embeddings = 0.3 * torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length)
    positions[length // 2 :] += gap
    return Request(embeddings, positions, max_new_tokens, stop)


def completed(answers: Sequence[Completion | GenerationError]) -> list[list[int]]:
    assert all(isinstance(answer, Completion) for answer in answers)
    return [list(answer.token_ids) for answer in answers if isinstance(answer, Completion)]


@torch.inference_mode()
def without_a_cache(model: PreTrainedModel, request: Request) -> list[int]:
    """Greedy ids from one whole forward a token: nothing is padded, cached or batched."""
    embeddings, positions, ids = request.embeddings[None], request.positions[None], list[int]()
    while len(ids) < request.max_new_tokens:
        mask = torch.ones_like(positions)
        logits: Tensor = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
        ids.append(int(logits[0, -1].argmax()))
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_equals_transformers_generate_prompt_by_prompt(family: str) -> None:
    requests = [request(length) for length in LENGTHS]
    answers = completed(engine(family).generate(requests))

    model = language_model(family)
    for asked, answer in zip(requests, answers, strict=True):
        expected = model.generate(inputs_embeds=asked.embeddings[None], max_new_tokens=12, do_sample=False)
        assert answer == expected[0].tolist()
    assert len({tuple(answer) for answer in answers}) == len(LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_with_gaps_equal_a_loop_without_a_cache(family: str) -> None:
    requests = [request(length, gap=gap) for length, gap in zip(LENGTHS, [0, 40, 7, 21], strict=True)]

    expected = [without_a_cache(language_model(family), asked) for asked in requests]
    assert completed(engine(family).generate(requests)) == expected


def test_gaps_in_the_positions_change_the_answer() -> None:
    near, far = completed(engine().generate([request(17), request(17, gap=40)]))
    assert near != far


def test_each_request_ends_at_its_own_limit() -> None:
    limits = [5, 1, 12, 3]
    requests = [request(n, max_new_tokens=limit) for n, limit in zip(LENGTHS, limits, strict=True)]
    alone = [completed(engine().generate([request(n)]))[0] for n in LENGTHS]

    answers = engine().generate(requests)
    assert completed(answers) == [ids[:limit] for ids, limit in zip(alone, limits, strict=True)]
    assert [answer.finish_reason for answer in answers if isinstance(answer, Completion)] == ["length"] * 4


def test_any_of_several_end_of_sequence_tokens_stops_and_is_left_out() -> None:
    free = completed(engine().generate([request(n) for n in LENGTHS]))
    first, second = free[0][4], free[1][6]

    answers = engine(eos_token_ids=[first, second]).generate([request(n) for n in LENGTHS])
    for ids, answer in zip(free, answers, strict=True):
        end = next((i for i, token in enumerate(ids) if token in (first, second)), None)
        assert answer == Completion(tuple(ids[:end]), "length" if end is None else "stop")


def test_an_answer_may_be_empty() -> None:
    first = completed(engine().generate([request(3)]))[0][0]
    assert engine(eos_token_ids=[first]).generate([request(3)]) == [Completion((), "stop")]


def test_a_stop_string_ends_its_own_answer_only() -> None:
    free = completed(engine().generate([request(n) for n in LENGTHS]))
    stop = decode(free[0][4:6])
    answers = engine().generate([request(LENGTHS[0], stop=("never", stop)), request(LENGTHS[1])])

    text = decode(free[0])
    assert answers[0] == Completion(tuple(free[0][: text.index(stop) + len(stop)]), "stop")
    assert answers[1] == Completion(tuple(free[1]), "length")


def test_a_prompt_beyond_the_context_fails_alone() -> None:
    fits, too_long, leaps = request(116), request(117), request(9, gap=110)
    answers = engine().generate([too_long, fits, leaps])

    assert isinstance(answers[0], CapacityError)
    assert "context holds 128" in str(answers[0])
    assert isinstance(answers[2], CapacityError)
    assert completed(answers[1:2]) == completed(engine().generate([fits]))


def test_scores_that_are_not_numbers_fail_their_row_only() -> None:
    sound = request(9)
    broken = Request(torch.full((3, 32), torch.nan), torch.arange(3), 12)
    answers = engine().generate([broken, sound])

    assert isinstance(answers[0], GenerationError)
    assert completed(answers[1:]) == completed(engine().generate([sound]))


def test_no_requests_give_no_answers() -> None:
    assert engine().generate([]) == []


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
