"""Generation from embeddings: what an engine is asked and what it answers.

An engine knows nothing of images. It gets whole prompts as embeddings of ragged lengths, each with its
position ids, and continues every one of them greedily. It answers in the order of the requests; a request
that it cannot serve is answered by an error, and its neighbours are served all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from hired.errors import CapacityError, GenerationError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt: ``embeddings`` ``[n, d]`` and rising ``positions`` int64 ``[n]``, gaps allowed.

    Generation ends at an end-of-sequence token, once the text holds one of the ``stop`` strings, or after
    ``max_new_tokens``.
    """

    embeddings: Tensor
    positions: Tensor
    max_new_tokens: int
    stop: tuple[str, ...] = ()

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

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])

    def check_fits(self, max_positions: int | None) -> None:
        """Raise CapacityError when the answer could outgrow the model's context; None means no limit."""
        end = int(self.positions[-1])
        if max_positions is not None and end + self.max_new_tokens >= max_positions:
            raise CapacityError(
                f"the prompt ends at position {end} and may grow by {self.max_new_tokens} tokens, but the "
                f"model's context holds {max_positions}: shorten it or lower max_new_tokens"
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """The generated ids, without the end-of-sequence token that closed them, and why they ended.

    The ids of a stop string are kept; whoever makes the text cuts it there.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Engine(Protocol):
    """Anything that continues prompts greedily."""

    def generate(self, requests: Sequence[Request]) -> list[Completion | GenerationError]:
        """One answer a request, in the same order."""
        ...
