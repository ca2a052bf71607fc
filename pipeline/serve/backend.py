"""What the endpoint asks of the three stages, wherever they run.

    bytes --partition--> Partitions --encode--> VisualTokens --stream--> texts, and the Caption that ends them

``LocalBackend`` runs them in this process, ``ServeBackend`` in deployments of Ray Serve. Errors are those of
``hired.errors``; ``UnavailableError`` says that a stage cannot be reached just now.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hired.budget import Budget
from hired.engine import GREEDY, Sampling
from hired.errors import HiredError
from hired.prompts import Conversation
from hired.types import Caption, Partitions, VisualTokens


class UnavailableError(HiredError):
    """A stage is starting, has died, or has more to do than it can take; another time may do."""

    retryable = True


@dataclass(frozen=True, slots=True)
class Query:
    """What is to be answered, and how. The conversation's images are given beside it, in its order."""

    conversation: Conversation
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a page has to know of the model.

    A sub-image is ``side`` pixels and ``patches_per_side`` patches wide. The attention of ``num_layers``
    layers can be shown; features come from ``feature_layer``.
    """

    side: int
    patches_per_side: int
    num_layers: int
    feature_layer: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What one generate worker holds: sequences, and places of its key-value cache."""

    worker: str
    running: int
    waiting: int
    places_free: int
    places: int


class Backend(Protocol):
    """The stages, for any number of requests at once."""

    async def card(self) -> ModelCard:
        """What the model is like."""
        ...

    async def partition(self, image: bytes) -> Partitions:
        """The full-image and the sub-images; raises ImageError."""
        ...

    async def encode(self, partitions: Partitions, budget: Budget, policy: str) -> VisualTokens:
        """The visual tokens that survive dropping; raises ConfigurationError for an unknown policy."""
        ...

    async def see(self, image: bytes, budget: Budget, policy: str) -> VisualTokens:
        """``partition`` and ``encode`` in one, with pixels that need not pass through here."""
        ...

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        """What CLS attends to, by layer: float32 ``[k + 1, patches]``, summed over heads.

        ``layers`` count from 0; by default the two that HiRED reads. Raises ConfigurationError for others.
        """
        ...

    def stream(
        self, query: Query, images: Sequence[VisualTokens], *, in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        """Texts that join to the caption's, and last the caption; ``in_parts`` False gives it alone.

        Closing it takes the sequence out of the batch. Raises GenerationError for a prompt that cannot be
        answered, EngineDeadError or UnavailableError when its worker is gone.
        """
        ...

    async def health(self) -> None:
        """Returns if every stage can work; raises HiredError if not."""
        ...

    async def loads(self) -> Sequence[EngineLoad]:
        """What engines hold, as far as can be asked at once."""
        ...
