"""The engine on vLLM against the one on transformers: over a fake, and over vLLM where it is installed.

The fake has the part of vLLM's interface that the engine uses, and computes real answers with transformers.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from hired.engine import GREEDY, Completion, EngineOptions, Request, Sampling
from hired.engine.transformers_engine import TransformersEngine
from hired.engine.vllm_engine import VllmEngine, language_model_folder, write_language_model
from hired.errors import CapacityError, ConfigurationError, GenerationError
from tests.language_models import completed
from tests.tiny import byte_level_tokenizer, tiny_llava_next

LENGTHS = [3, 17, 1, 9]
CONTEXT = 128
TOKENIZER = byte_level_tokenizer()


# A small vLLM


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop: list[str] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True")


@dataclass
class Running:
    params: SamplingParams
    inputs: dict[str, Tensor]
    cache: DynamicCache
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)


class FakeLLMEngine:
    """Continues up to ``max_num_seqs`` sequences by a token a step, each on its own."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_model_len: int, max_num_seqs: int) -> None:
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs))
        self.most_at_once = 0
        self.requests: dict[str, Running] = {}
        self.given_up: set[str] = set()
        self._model = model
        self._tokenizer = tokenizer

    def add_request(self, request_id: str, prompt: dict[str, Tensor], params: SamplingParams) -> None:
        embeddings = prompt["prompt_embeds"]
        width = self._model.config.hidden_size
        if embeddings.ndim != 2 or embeddings.shape[1] != width or embeddings.dtype != self._model.dtype:
            raise ValueError(f"prompt_embeds must be of shape (seq_len, {width})")
        if len(embeddings) > self.model_config.max_model_len:
            raise ValueError("the prompt is longer than the maximum model length")
        assert embeddings.device.type == "cpu"
        assert request_id not in self.requests
        self.requests[request_id] = Running(
            params,
            {"inputs_embeds": embeddings[None]},
            DynamicCache(config=self._model.config),
            torch.Generator().manual_seed(params.seed or 0),
        )

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def step(self) -> list[SimpleNamespace]:
        self.most_at_once = max(self.most_at_once, len(self.requests))
        together = list(self.requests)[: self.vllm_config.scheduler_config.max_num_seqs]
        return [self._advanced(request_id) for request_id in together]

    @torch.inference_mode()
    def _advanced(self, request_id: str) -> SimpleNamespace:
        running = self.requests[request_id]
        logits = self._model(**running.inputs, past_key_values=running.cache, use_cache=True).logits[0, -1]
        token_id = _chosen(logits, running.params, running.generator)
        running.inputs = {"input_ids": torch.tensor([[token_id]])}
        running.token_ids.append(token_id)
        reason = "abort" if request_id in self.given_up else self._finish_reason(running)
        if reason:
            del self.requests[request_id]
        assert running.params.output_kind is RequestOutputKind.DELTA
        part = SimpleNamespace(token_ids=[token_id], finish_reason=reason)
        return SimpleNamespace(request_id=request_id, outputs=[part], finished=reason is not None)

    def _finish_reason(self, running: Running) -> str | None:
        params, ids = running.params, running.token_ids
        eos = [] if params.ignore_eos else [self._tokenizer.eos_token_id]
        if ids[-1] in eos + (params.stop_token_ids or []):
            return "stop"
        text = self._tokenizer.decode(ids, skip_special_tokens=True) if params.stop else ""
        if any(stop in text for stop in params.stop or []):
            return "stop"
        return "length" if len(ids) == params.max_tokens else None


def _chosen(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / params.temperature).softmax(-1).sort(descending=True)
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < params.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


class FakeLLM:
    """Takes the arguments that the tests give, and refuses all others as ``vllm.LLM`` does."""

    started: list[FakeLLM]

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        enable_prompt_embeds: bool,
        enable_prefix_caching: bool,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        **others: Any,
    ) -> None:
        known = {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens"}
        known |= {"tensor_parallel_size", "quantization", "enforce_eager"}
        if unknown := set(others) - known:
            raise TypeError(f"unexpected keyword arguments {unknown}")
        assert enable_prompt_embeds
        assert not enable_prefix_caching
        self.others = others
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        context = max_model_len or loaded.config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.llm_engine = FakeLLMEngine(loaded, tokenizer, context, max_num_seqs)
        FakeLLM.started.append(self)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    vllm, sampling_params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(sampling_params).update(RequestOutputKind=RequestOutputKind)
    vars(vllm).update(LLM=FakeLLM, SamplingParams=SamplingParams, sampling_params=sampling_params)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)
    FakeLLM.started = []
    return FakeLLM


# What both are asked


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_llava_next(folder, text=request.param, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return LlavaNextForConditionalGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model alone."""
    folder = tmp_path_factory.mktemp("language_model")
    write_language_model(model, TOKENIZER, folder)
    return folder


NewEngine = Callable[..., VllmEngine]
KINDS = ["fake", "real"] if importlib.util.find_spec("vllm") else ["fake"]


@pytest.fixture(params=KINDS)
def new_engine(request: pytest.FixtureRequest, folder: Path) -> NewEngine:
    real: dict[str, Any] = {"enforce_eager": True, "gpu_memory_utilization": 0.2}
    if request.param == "fake":
        request.getfixturevalue("fake_vllm")

    def new(eos_token_ids: Sequence[int] = (), options: EngineOptions | None = None) -> VllmEngine:
        options = options or EngineOptions("vllm", vllm={} if request.param == "fake" else real)
        return VllmEngine(
            folder, dtype=torch.float32, eos_token_ids=eos_token_ids, decode=decode, options=options
        )

    return new


def decode(token_ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(token_ids), skip_special_tokens=True))


def on_transformers(model: PreTrainedModel, eos_token_ids: Sequence[int] = ()) -> TransformersEngine:
    return TransformersEngine(model, eos_token_ids=eos_token_ids, decode=decode)


def request_of(
    length: int, *, max_new_tokens: int = 12, stop: tuple[str, ...] = (), sampling: Sampling = GREEDY
) -> Request:
    embeddings = torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
    return Request(embeddings, torch.arange(length), max_new_tokens, stop, sampling)


def test_ragged_prompts_are_answered_as_on_transformers(
    new_engine: NewEngine, model: PreTrainedModel
) -> None:
    asked = [request_of(n, max_new_tokens=limit) for n, limit in zip(LENGTHS, [12, 1, 7, 20], strict=True)]
    answers = new_engine().generate(asked)
    assert answers == on_transformers(model).generate(asked)
    assert len({tuple(ids) for ids in completed(answers)}) == len(LENGTHS)


def test_answers_end_at_any_end_of_sequence_token_which_is_left_out(
    new_engine: NewEngine, model: PreTrainedModel
) -> None:
    asked = [request_of(n) for n in LENGTHS]
    free = completed(on_transformers(model).generate(asked))
    closing = [free[0][4], free[1][6], free[2][0]]
    answers = new_engine(closing).generate(asked)
    assert answers == on_transformers(model, closing).generate(asked)
    assert Completion((), "stop") in answers


def test_a_stop_string_ends_its_own_answer_and_its_ids_are_kept(
    new_engine: NewEngine, model: PreTrainedModel
) -> None:
    free = completed(on_transformers(model).generate([request_of(n) for n in LENGTHS]))
    stop = decode(free[0][3:6])
    asked = [request_of(LENGTHS[0], stop=("never", stop)), *(request_of(n) for n in LENGTHS[1:])]
    answers = new_engine().generate(asked)
    assert answers == on_transformers(model).generate(asked)
    first = answers[0]
    assert isinstance(first, Completion)
    assert first.finish_reason == "stop"
    assert stop in decode(first.token_ids)


def test_the_same_seed_draws_the_same_answer_in_any_company(new_engine: NewEngine) -> None:
    drawn = [request_of(9, sampling=Sampling(temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 2, 1)]
    engine = new_engine()
    together = completed(engine.generate([request_of(3), *drawn, request_of(17)]))[1:-1]
    assert together == [completed(engine.generate([one]))[0] for one in drawn]
    assert together[0] == together[2] != together[1]


def test_a_stream_tells_every_token_once_and_ends_every_request(new_engine: NewEngine) -> None:
    asked = [request_of(n, max_new_tokens=4 + n) for n in LENGTHS]
    engine = new_engine()
    expected = engine.generate(asked)
    events = list(engine.stream(asked))
    for index, outcome in enumerate(expected):
        own = [event for event in events if event.index == index]
        assert isinstance(outcome, Completion)
        assert tuple(event.token_id for event in own if event.token_id is not None) == outcome.token_ids
        assert [event.outcome for event in own if event.outcome is not None] == [own[-1].outcome] == [outcome]


def test_prompts_that_cannot_be_served_fail_alone(new_engine: NewEngine, model: PreTrainedModel) -> None:
    sound, too_long = request_of(9), request_of(CONTEXT - 11)
    no_numbers = Request(torch.full((3, 32), torch.nan), torch.arange(3), 12)
    answers = new_engine().generate([too_long, sound, no_numbers])
    assert isinstance(answers[0], CapacityError)
    assert "context holds 128" in str(answers[0])
    assert isinstance(answers[2], GenerationError)
    assert answers[1:2] == on_transformers(model).generate([sound])


def test_positions_with_gaps_are_refused_with_the_mend(new_engine: NewEngine) -> None:
    leaps = Request(torch.zeros(3, 32), torch.tensor([0, 1, 5]), 4)
    with pytest.raises(ConfigurationError, match="positions=compact"):
        new_engine().generate([request_of(3), leaps])


def test_no_requests_give_no_answers(new_engine: NewEngine) -> None:
    assert new_engine().generate([]) == []


def test_whoever_stops_listening_cancels_what_still_runs(new_engine: NewEngine) -> None:
    engine = new_engine()
    events = engine.stream([request_of(n, max_new_tokens=50) for n in LENGTHS])
    next(events)
    events.close()
    assert not engine.has_work
    assert not engine._engine.has_unfinished_requests()
    assert completed(engine.generate([request_of(3)]))


# What only the fake can show


def started(folder: Path, **options: Any) -> VllmEngine:
    return VllmEngine(
        folder, dtype=torch.float32, eos_token_ids=(), decode=decode, options=EngineOptions("vllm", **options)
    )


def test_requests_are_taken_as_there_is_room(fake_vllm: type[FakeLLM], folder: Path) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for index in range(9):
            taken.append(index)
            yield request_of(3, max_new_tokens=2)

    engine = started(folder, max_sequences=2)
    events = engine.stream(requests())
    next(events)
    assert len(taken) == 2
    assert sum(event.outcome is not None for event in events) == 9
    assert fake_vllm.started[0].llm_engine.most_at_once == 2


def test_the_options_reach_vllm_and_the_callers_own_win(fake_vllm: type[FakeLLM], folder: Path) -> None:
    own = {"tensor_parallel_size": 2, "quantization": "fp8", "gpu_memory_utilization": 0.5}
    started(folder, kv_cache_bytes=2**20, prefill_tokens=512, memory_fraction=0.8, vllm=own)
    assert fake_vllm.started[0].others == own | {
        "kv_cache_memory_bytes": 2**20,
        "max_num_batched_tokens": 512,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vllm": {"enable_prefix_caching": True}}, "enable_prefix_caching cannot be chosen"),
        ({"vllm": {"model": "other"}}, "model cannot be chosen"),
        ({"vllm": {"tensor_paralel_size": 2}}, "vLLM does not start with .*tensor_paralel_size=2"),
        ({"quantisation": "int4"}, "name a method of vLLM's own"),
    ],
)
@pytest.mark.usefixtures("fake_vllm")
def test_options_that_cannot_be_followed_are_refused(
    folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        started(folder, **options)


def test_a_missing_vllm_is_named_with_the_command_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigurationError, match=r"pip install hired\[vllm\]"):
        started(folder)


@pytest.mark.usefixtures("fake_vllm")
def test_what_vllm_refuses_or_gives_up_fails_alone(folder: Path) -> None:
    engine = started(folder)
    engine._engine.given_up = {"2"}
    too_wide = Request(torch.zeros(3, 40), torch.arange(3), 4)
    refused, sound, given_up = engine.generate([too_wide, request_of(3), request_of(9)])
    assert isinstance(refused, GenerationError)
    assert "vLLM refuses the prompt" in str(refused)
    assert isinstance(sound, Completion)
    assert isinstance(given_up, GenerationError)
    assert "gave the answer up after 1 tokens" in str(given_up)


@pytest.mark.usefixtures("fake_vllm")
def test_two_streams_at_once_are_refused(folder: Path) -> None:
    engine = started(folder)
    first = engine.stream([request_of(3)])
    next(first)
    with pytest.raises(ConfigurationError, match="one stream at a time"):
        engine.generate([request_of(3)])
    assert any(event.outcome for event in first)


# The language model's own checkpoint


def test_the_language_model_written_out_scores_as_it_did_inside(model: PreTrainedModel, folder: Path) -> None:
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(alone(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not [name for name in alone.state_dict() if "vision" in name or "projector" in name]
    assert AutoTokenizer.from_pretrained(folder).decode([40, 41]) == TOKENIZER.decode([40, 41])


def test_the_language_model_is_written_once_for_each_state_of_the_checkpoint(tmp_path: Path) -> None:
    source, cache = tmp_path / "model", tmp_path / "cache"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"one")
    written: list[Path] = []

    def write(folder: Path) -> None:
        written.append(folder)
        (folder / "config.json").write_text("{}")

    def folder(dtype: torch.dtype = torch.float16) -> Path:
        return language_model_folder(source, dtype, write, cache=cache)

    first = folder()
    assert (first / "config.json").read_text() == "{}"
    assert folder() == first
    assert len(written) == 1
    assert folder(torch.bfloat16) != first
    (source / "model.safetensors").write_bytes(b"three")
    assert folder() != first
    assert len(written) == len(list(cache.iterdir())) == 3


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("of it")
        raise OSError("no space left on device")

    with pytest.raises(ConfigurationError, match=r"no space left.*XDG_CACHE_HOME"):
        language_model_folder(tmp_path, torch.float16, write, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_two_that_write_at_once_end_with_one_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    def write_slowly(folder: Path) -> None:
        language_model_folder(tmp_path, torch.float16, write, cache=cache)
        write(folder)

    folder = language_model_folder(tmp_path, torch.float16, write_slowly, cache=cache)
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = language_model_folder(tmp_path, torch.float16, lambda folder: None)
    assert folder.is_relative_to(tmp_path)
    assert folder.parent.parts[-2:] == ("hired", "language_models")
