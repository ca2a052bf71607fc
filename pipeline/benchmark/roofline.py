"""The least time that a piece of work can take: its arithmetic and bytes, counted, over measured ceilings.

Counted are matrix products and attention (a multiplication and an addition are two operations; causal
attention is half of the square) and, for a decode step, the weights and the keys and values that it reads.
Everything else is left out, so no program reaches 100 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.benchmark.measure import now


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower, up to the layer whose output is used."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    side: int
    patch_size: int

    @property
    def num_patches(self) -> int:
        return (self.side // self.patch_size) ** 2

    def flops(self, num_partitions: int) -> float:
        """Of encoding so many partitions."""
        d, tokens = self.hidden_size, self.num_patches + 1
        matrices = 4 * d * d + 2 * d * self.intermediate_size
        layer = 2 * matrices * tokens + 4 * tokens**2 * d
        embedding = 2 * self.num_patches * 3 * self.patch_size**2 * d
        return float(num_partitions * (self.num_layers * layer + embedding))


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A decoder-only transformer with gated MLPs."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """The entries of all layers' matrices."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def weights(self) -> int:
        """With the output matrix, but without the embeddings, of which a step reads only a few rows."""
        return self.layer_weights + self.hidden_size * self.vocab_size

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def prefill_flops(self, num_tokens: int) -> float:
        """Of one prompt up to its first new token."""
        attention = 2 * num_tokens**2 * self.num_layers * self.num_heads * self.head_dim
        return float(2 * self.layer_weights * num_tokens + attention + 2 * self.hidden_size * self.vocab_size)

    def decode_bytes(self, held: int, num_steps: int, dtype: torch.dtype) -> float:
        """Read by so many passes of one token a sequence, which see ``held`` keys in all (see ``held``)."""
        return float(num_steps * self.weights * dtype.itemsize + held * self.kv_bytes_per_token(dtype))

    def decode_flops(self, held: int, num_tokens: int) -> float:
        """Of so many tokens that see ``held`` keys in all."""
        attention = 4 * held * self.num_layers * self.num_heads * self.head_dim
        return float(2 * self.weights * num_tokens + attention)


def held(prompts: Iterable[int], num_steps: int) -> int:
    """The keys that all tokens after each prompt's first see, added up; every token sees itself."""
    return sum(num_steps * length + num_steps * (num_steps + 1) // 2 for length in prompts)


def shapes(config: Any) -> tuple[Tower, LanguageModel]:
    """Both halves of a LLaVA-NeXT, from its configuration."""
    vision, text = config.vision_config, config.get_text_config()
    feature_layer = config.vision_feature_layer
    tower = Tower(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        # hidden_states[-1] is the last layer's output, hidden_states[0] the embeddings.
        num_layers=feature_layer if feature_layer >= 0 else vision.num_hidden_layers + feature_layer + 1,
        side=vision.image_size,
        patch_size=vision.patch_size,
    )
    language = LanguageModel(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
    )
    return tower, language


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device does at best, in one dtype: operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, num_bytes: float = 0.0) -> float:
        """The least time for work that may overlap its arithmetic with its reading."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def __or__(self, other: Ceilings) -> Ceilings:
        """The higher of both: whatever is slower was disturbed."""
        return Ceilings(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s))


def measured_ceilings(device: torch.device, dtype: torch.dtype, *, scale: float = 1.0) -> Ceilings:
    """The best of several square matrix products, and of copying and adding up a large array.

    ``scale`` shrinks both; at 1 they take seconds.
    """
    on_gpu = device.type == "cuda"
    n = max(64, int((8192 if on_gpu else 2048) * scale))
    flops_per_s = 0.0
    for rows, inner, cols in ((n, n, n), (2 * n, n // 2, 2 * n)):
        left, right = torch.randn(rows, inner).to(device, dtype), torch.randn(inner, cols).to(device, dtype)
        taken_s = _best_s(partial(torch.mm, left, right), device, for_s=scale)
        flops_per_s = max(flops_per_s, 2 * rows * inner * cols / taken_s)
    # Far larger than any cache.
    count = max(1024, int((2**28 if on_gpu else 2**27) * scale))
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copied = 2 * 4 * count / _best_s(partial(target.copy_, source), device, for_s=scale)
    read = 4 * count / _best_s(source.sum, device, for_s=scale)
    return Ceilings(flops_per_s, max(copied, read))


def _best_s(work: Callable[[], Any], device: torch.device, *, for_s: float, at_least: int = 5) -> float:
    """Seconds of the fastest call."""
    work()
    best, begun, calls = float("inf"), time.perf_counter(), 0
    while calls < at_least or time.perf_counter() - begun < for_s:
        start = now(device)
        work()
        best, calls = min(best, now(device) - start), calls + 1
    return best
