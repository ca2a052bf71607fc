"""Generation from embeddings: what an engine is asked and what it answers.

An engine knows nothing of images. It gets whole prompts as embeddings of ragged lengths, each with its
position ids, and continues every one of them. It answers in the order of the requests; a request that it
cannot serve is answered by an error, and its neighbours are served all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from hired.errors import CapacityError, ConfigurationError, GenerationError

FinishReason = Literal["stop", "length"]
EngineName = Literal["auto", "continuous", "transformers", "vllm"]
Quantisation = Literal["none", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 is greedy. Otherwise a token is drawn from the smallest set of tokens whose probability
    reaches ``top_p``; the same ``seed`` draws the same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ConfigurationError(f"temperature must be from 0 (greedy) to 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt: ``embeddings`` ``[n, d]`` and rising ``positions`` int64 ``[n]``, gaps allowed.

    ``shared_prefix`` holds the ids of the first tokens where many prompts begin alike: an engine may compute
    them once. Negative ones name what is no text, such as a certain image. Their embeddings come first in
    ``embeddings`` all the same, and prompts that share them have the same positions there.
    Generation ends at an end-of-sequence token, once the text holds one of the ``stop`` strings, or after
    ``max_new_tokens``.
    """

    embeddings: Tensor
    positions: Tensor
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    shared_prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = self.embeddings.shape[0]
        if n == 0 or self.embeddings.ndim != 2 or self.positions.shape != (n,):
            raise ValueError(
                f"embeddings [n, d] and positions [n] disagree: "
                f"{tuple(self.embeddings.shape)}, {tuple(self.positions.shape)}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer before it begins")
        if len(self.shared_prefix) >= n:
            raise ValueError(f"a prompt of {n} tokens cannot share its first {len(self.shared_prefix)}")

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def num_positions(self) -> int:
        """The positions that the prompt and the longest possible answer take."""
        return int(self.positions[-1]) + 1 + self.max_new_tokens

    def check_fits(self, max_positions: int | None) -> None:
        """Raise CapacityError when the answer could outgrow the model's context; None means no limit."""
        if max_positions is not None and self.num_positions > max_positions:
            raise CapacityError(
                f"the prompt ends at position {int(self.positions[-1])} and may grow by "
                f"{self.max_new_tokens} tokens, but the model's context holds {max_positions}: shorten it or "
                "lower max_new_tokens"
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """The generated ids, without the end-of-sequence token that closed them, and why they ended.

    The ids of a stop string are kept; whoever makes the text cuts it there.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


Outcome = Completion | GenerationError


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to request number ``index``: a token, its end, or both at once."""

    index: int
    token_id: int | None = None
    outcome: Outcome | None = None


class Engine(Protocol):
    """Anything that continues prompts."""

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        """One answer a request, in the same order. Requests are taken as there is room for them."""
        ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """The same, told token by token; the events of several requests mix.

        Whoever stops listening cancels what is still running.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine, and what it may take.

    ``auto`` is the continuous engine for every language model that it knows, and transformers' otherwise.
    ``kv_cache_bytes`` None is what ``memory_fraction`` of the device's memory leaves free; the number of
    sequences decoded together follows from it, ``max_sequences`` only caps it. ``prefill_tokens`` bounds one
    prefill pass and so its memory. ``quantisation`` stores the weights of the language model's layers in
    fewer bits. ``vllm`` goes to ``vllm.LLM`` as it is.
    """

    name: EngineName = "auto"
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    max_sequences: int | None = None
    prefill_tokens: int | None = None
    quantisation: Quantisation = "none"
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("name", self.name, EngineName),
            ("quantisation", self.quantisation, Quantisation),
        ):
            if value not in get_args(known):
                raise ConfigurationError(
                    f"engine {option} is {value!r}, use one of {', '.join(get_args(known))}"
                )
        for option in ("kv_cache_bytes", "max_sequences", "prefill_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigurationError(f"engine {option} must be at least 1, got {value}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigurationError(
                f"engine memory_fraction must be above 0 and at most 1, got {self.memory_fraction}"
            )


def answers_in_order(events: Iterable[Event]) -> list[Outcome]:
    """The outcomes of a whole stream, by request."""
    outcomes = {event.index: event.outcome for event in events if event.outcome is not None}
    return [outcomes[index] for index in range(len(outcomes))]
