"""Decode passes as CUDA graphs: one launch in place of some hundred, so that the device sets the pace.

A graph has fixed shapes, so passes are rounded up to a bucket of (sequences, keys): the missing sequences
read and write a scratch place. Graphs are captured when a bucket is first met and share one memory pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hired.engine.decoder import Decoder
from hired.engine.kv_cache import KVCache, Segment
from hired.engine.ragged_attention import VarlenAttention
from hired.errors import ConfigurationError

WARM_UPS = 2


def batch_bucket(num_sequences: int) -> int:
    """1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, of 32 above."""
    if num_sequences <= 8:
        return 1 << (num_sequences - 1).bit_length()
    step = 8 if num_sequences <= 64 else 16 if num_sequences <= 256 else 32
    return -(-num_sequences // step) * step


def length_bucket(num_keys: int) -> int:
    """A power of two from 256 on; the kernel divides its work by it, and reads what is there."""
    return max(256, 1 << (num_keys - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, its input int64 ``[4, batch]`` (see ``DecodeGraphs.logits``) and its scores."""

    graph: torch.cuda.CUDAGraph
    columns: Tensor
    logits: Tensor


class DecodeGraphs:
    """The graphs of one decoder and one cache."""

    def __init__(self, decoder: Decoder, cache: KVCache, attention: VarlenAttention) -> None:
        self._decoder, self._cache, self._attention = decoder, cache, attention
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        scratch = cache.arena.allocate(1)
        if scratch is None:
            raise ConfigurationError("the key-value cache has no place at all; give it more memory")
        self._scratch = scratch.start

    def logits(self, segments: Sequence[Segment], positions: Sequence[int], last_ids: Tensor) -> Tensor:
        """Float32 ``[m, vocabulary]`` of the tokens in ``last_ids`` at the segments' starts.

        Valid until the next call.
        """
        num = len(segments)
        batch = batch_bucket(num)
        missing = [self._scratch] * (batch - num)
        columns = [
            [*(s.start for s in segments), *missing],
            [*(s.start + s.num_cached for s in segments), *missing],
            [*(s.num_after for s in segments), *(1 for _ in missing)],
            [*positions, *(0 for _ in missing)],
        ]
        key = batch, length_bucket(max(s.num_after for s in segments))
        host = torch.tensor(columns, dtype=torch.int64).pin_memory()
        if key not in self._captured:
            self._captured[key] = self._capture(*key, host.to(self._decoder.device), last_ids)
        captured = self._captured[key]
        captured.columns.copy_(host, non_blocking=True)
        captured.graph.replay()
        return captured.logits[:num]

    def _capture(self, batch: int, num_keys: int, columns: Tensor, last_ids: Tensor) -> _Captured:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels pick their algorithms outside of the capture
            for _ in range(WARM_UPS):
                self._forward(columns, last_ids, num_keys)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls belong to the graph: another may be encoding.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(columns, last_ids, num_keys)
        return _Captured(graph, columns, logits)

    def _forward(self, columns: Tensor, last_ids: Tensor, max_keys: int) -> Tensor:
        starts, places, num_keys, positions = columns
        batch = len(starts)
        end = starts.new_full((1,), self._cache.num_places)
        attend = self._attention.attend_at(
            places,
            torch.arange(batch + 1, dtype=torch.int32, device=starts.device),
            torch.cat([starts, end]).int(),
            num_keys.int(),
            max_queries=1,
            max_keys=max_keys,
        )
        states = self._decoder.forward(self._decoder.embed(last_ids[starts]), positions, attend)
        return self._decoder.logits(states)
