"""The language model seen from inside: a plain causal forward over several sequences, one after the other.

Written to be read. It runs the weights that the engine runs, without its cache and its batching, so that an
evaluation can ask for what an engine never tells: the likelihood of an answer, and who attends to what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hired.engine.continuous import ContinuousEngine
from hired.engine.decoder import Decoder
from hired.engine.shared import SharedEngine
from hired.errors import ConfigurationError

if TYPE_CHECKING:
    from hired.vlm import VLM

# Of all sequences that go through the model together; bounds memory.
MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A whole sequence: ``embeddings`` ``[n, d]`` and ``positions`` int64 ``[n]``, on the model's device."""

    embeddings: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)


def decoder_of(vlm: VLM) -> Decoder:
    """The language model's own weights. Raises ConfigurationError for an engine that keeps them to itself."""
    engine = vlm.generator.engine
    if isinstance(engine, SharedEngine):
        engine = engine.engine  # type: ignore[assignment]  # a stepped engine
    if not isinstance(engine, ContinuousEngine):
        raise ConfigurationError(
            f"{type(engine).__name__} does not show its language model from inside; load the model with "
            'engine=EngineOptions(name="continuous")'
        )
    return engine.decoder


def groups(lengths: Sequence[int], max_tokens: int | None = None) -> Iterator[slice]:
    """Neighbours whose lengths add up to ``max_tokens`` at most, or one that is longer on its own."""
    max_tokens = max_tokens or MAX_TOKENS
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > max_tokens:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


class CausalAttention:
    """``Attend`` of a decoder for sequences of these ``lengths``, packed one after the other.

    A token gathers from itself and those before it in its own sequence, within its layer's window.
    """

    def __init__(self, decoder: Decoder, lengths: Sequence[int]) -> None:
        self._windows = decoder.shape.windows
        self._lengths = list(lengths)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        sequences = zip(
            *(torch.split(tensor, self._lengths) for tensor in (queries, keys, values)), strict=True
        )
        window = self._windows[layer]
        return torch.cat([gathered(q, k, v, seen(len(q), len(k), window, q)) for q, k, v in sequences])


def gathered(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What ``queries`` ``[n, heads, d]`` gather of ``values`` ``[m, kv_heads, d]``: ``[n, heads * d]``.

    ``mask`` bool ``[n, m]`` says who sees whom.
    """
    repeats = queries.shape[1] // keys.shape[1]
    k, v = (each.repeat_interleave(repeats, 1).transpose(0, 1) for each in (keys, values))
    q = queries.transpose(0, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)


def attention(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """The attention itself, a mean over heads: float32 ``[n, m]``; arguments as in ``gathered``."""
    repeats = queries.shape[1] // keys.shape[1]
    logits = torch.einsum("nhd,mhd->hnm", queries.float(), keys.float().repeat_interleave(repeats, 1))
    logits = (logits * queries.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    mean: Tensor = logits.softmax(-1).mean(0)
    return mean


def seen(num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
    """Which keys the last ``num_queries`` of ``num_keys`` tokens see, bool ``[num_queries, num_keys]``."""
    key = torch.arange(num_keys, device=like.device)
    query = key[num_keys - num_queries :, None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
