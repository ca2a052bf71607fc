"""How much memory the key-value cache may take on a device."""

from __future__ import annotations

from typing import Protocol

import torch

from hired.devices import host_memory_bytes
from hired.engine import EngineOptions
from hired.engine.decoder import Decoder

# A prefill pass this long keeps matrix products at full rate; longer ones only take memory.
PREFILL_TOKENS = {"cuda": 8192, "cpu": 4096}

# On a host, other workers and the object store live beside this process.
HOST_SHARE = 1 / 8


def prefill_tokens(decoder: Decoder, options: EngineOptions) -> int:
    """Prompt tokens that one pass may hold."""
    return options.prefill_tokens or PREFILL_TOKENS.get(decoder.device.type, PREFILL_TOKENS["cpu"])


def kv_cache_bytes(decoder: Decoder, options: EngineOptions) -> int:
    """The bytes that the options give, or what is left beside weights and workspace."""
    if options.kv_cache_bytes is not None:
        return options.kv_cache_bytes
    if decoder.device.type != "cuda":
        return int(host_memory_bytes() * HOST_SHARE * options.memory_fraction)
    free, total = torch.cuda.mem_get_info(decoder.device)
    held = torch.cuda.memory_allocated(decoder.device)
    unused = torch.cuda.memory_reserved(decoder.device) - held
    workspace = workspace_bytes(decoder.config, decoder.dtype, prefill_tokens(decoder, options))
    allowed = min(total * options.memory_fraction - held, free + unused)
    return max(0, int(allowed) - workspace)


class Widths(Protocol):
    """What of a configuration decides the size of a pass."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def workspace_bytes(config: Widths, dtype: torch.dtype, num_tokens: int) -> int:
    """What a pass over so many tokens takes beside weights and cache: the widest layer, and the scores.

    States before and after, normed states, queries, keys, values and what they gather are at most ten
    widths; gate, up, their product and its activation are five MLP widths at once. Scores are counted for
    512 sequences: as they come, in float32, and once more while one of them is chosen.
    """
    widths = 10 * config.hidden_size + 5 * config.intermediate_size
    scores = 512 * config.vocab_size * (dtype.itemsize + 8)
    return num_tokens * widths * dtype.itemsize + scores
