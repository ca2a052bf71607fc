"""Attention of packed tokens over each sequence's own extent of the KV cache: three ways, one result.

``VarlenAttention`` is one kernel for all sequences, on GPUs of compute capability 8.0 or higher.
``FusedAttention`` is torch's scaled_dot_product_attention, one call for each run of equal extents that lie
side by side; for older GPUs, and for float32 everywhere.
``BlockedAttention`` is for half precision on CPUs. The fused kernel reads 4 GB/s there while decoding and
computes 0.13 TFLOP/s while prefilling; plain matrix products read 14 GB/s and compute 0.19 TFLOP/s (two cores
with AVX512-BF16, 16 heads of 64, 2,928 tokens).

All write the new keys and values first, and let a token see what its sequence holds up to itself, within the
layer's sliding window.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from hired.devices import FIRST_BFLOAT16_GPU, sent
from hired.engine.decoder import Attend
from hired.engine.kv_cache import KVCache, Segment, places_of

BLOCK = 128  # queries at once in BlockedAttention: their scores stay in a core's cache


class RaggedAttention(Protocol):
    """Prepares what all layers of a pass share."""

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """The attention of a pass: its packed tokens are those of the segments, in order of extents."""
        ...


def ragged_attention(cache: KVCache) -> RaggedAttention:
    """The fastest way for the cache's device and dtype."""
    half = cache.shape.dtype in (torch.bfloat16, torch.float16)
    if cache.device.type == "cuda" and half:
        if torch.cuda.get_device_capability(cache.device) >= FIRST_BFLOAT16_GPU and _reads_extents():
            return VarlenAttention(cache)
    elif cache.device.type == "cpu" and half:
        return BlockedAttention(cache)
    return FusedAttention(cache)


def _reads_extents() -> bool:
    """Whether this torch's kernel takes keys of which only the first ones count."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "seqused_k" in inspect.signature(varlen_attn).parameters


class VarlenAttention:
    """torch's variable-length flash attention, which reads the arena in place."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """See RaggedAttention."""
        device = self._cache.device
        num_new = [0, *itertools.accumulate(segment.num_new for segment in segments)]
        columns = [
            num_new,
            [*(segment.start for segment in segments), self._cache.num_places],
            [*(segment.num_after for segment in segments), 0],
        ]
        first_query, first_key, num_keys = sent(torch.tensor(columns, dtype=torch.int32), device)
        return self.attend_at(
            sent(places_of(segments), device),
            first_query,
            first_key,
            num_keys[:-1],
            max_queries=max(segment.num_new for segment in segments),
            max_keys=max(segment.num_after for segment in segments),
        )

    def attend_at(
        self,
        places: Tensor,
        first_query: Tensor,
        first_key: Tensor,
        num_keys: Tensor,
        *,
        max_queries: int,
        max_keys: int,
    ) -> Attend:
        """The same from tensors on the device, which a CUDA graph may change in place.

        ``places`` int64 ``[n]``; of sequence i, the queries begin at ``first_query[i]`` and the extent at
        ``first_key[i]``, both int32 ``[sequences + 1]``; ``num_keys`` int32 ``[sequences]`` of the extent's
        places hold a token.
        """
        from torch.nn.attention.varlen import varlen_attn

        cache, shape = self._cache, self._cache.shape

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache.write(layer, places, keys, values)
            window = shape.windows[layer]
            gathered = varlen_attn(
                queries,
                cache.keys[layer],
                cache.values[layer],
                first_query,
                first_key,
                max_queries,
                max_keys,
                window_size=(-1 if window is None else window - 1, 0),
                enable_gqa=shape.num_heads != shape.num_kv_heads,
                seqused_k=num_keys,
            )
            assert isinstance(gathered, Tensor)
            return gathered.flatten(1)

        return attend


class FusedAttention:
    """scaled_dot_product_attention: a call a prompt, and a call a run of decoding sequences."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """See RaggedAttention."""
        cache = self._cache
        places = sent(places_of(segments), cache.device)
        runs = list(_runs(segments, cache.shape.windows, cache.device))

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache.write(layer, places, keys, values)
            return torch.cat([run.gather(cache, layer, queries) for run in runs])

        return attend


@dataclass(frozen=True, slots=True)
class _Run:
    """Segments of equal extents side by side, each with as many queries as the others.

    ``rows`` are theirs among the packed queries. ``masks`` by window: bool ``[b, 1, queries, keys]`` or None
    where causality alone decides.
    """

    rows: slice
    start: int
    capacity: int
    num_sequences: int
    num_queries: int
    num_keys: int
    masks: dict[int | None, Tensor | None]

    def gather(self, cache: KVCache, layer: int, queries: Tensor) -> Tensor:
        shape = cache.shape
        mask = self.masks[shape.windows[layer]]
        own = torch.unflatten(queries[self.rows], 0, (self.num_sequences, -1)).transpose(1, 2)
        keys, values = (self._view(of[layer]) for of in (cache.keys, cache.values))
        causal = mask is None and self.num_queries > 1
        # A causal mask needs as many queries as keys: those of cached tokens are made up, and left out again.
        missing = self.num_keys - self.num_queries if causal else 0
        gathered = scaled_dot_product_attention(
            pad(own, (0, 0, missing, 0)) if missing else own,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=shape.num_heads != shape.num_kv_heads,
        )
        return gathered[:, :, missing:].transpose(1, 2).flatten(2).flatten(0, 1)

    def _view(self, arena: Tensor) -> Tensor:
        """``[b, kv_heads, keys, head_dim]`` of one layer's ``[places, kv_heads, head_dim]``, in place."""
        place, head, _ = arena.stride()
        return arena.as_strided(
            (self.num_sequences, arena.shape[1], self.num_keys, arena.shape[2]),
            (self.capacity * place, head, place, 1),
            arena.storage_offset() + self.start * place,
        )


def _runs(segments: Sequence[Segment], windows: Sequence[int | None], device: torch.device) -> Iterator[_Run]:
    first = 0
    for together in _adjacent(segments):
        num_keys = max(segment.num_after for segment in together)
        num_queries = together[0].num_new
        rows = slice(first, first + num_queries * len(together))
        masks = {window: _mask(together, num_keys, window, device) for window in set(windows)}
        yield _Run(rows, together[0].start, together[0].capacity, len(together), num_queries, num_keys, masks)
        first = rows.stop


def _adjacent(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Decoding segments that one strided view holds together; prompts each alone."""
    run: list[Segment] = []
    for segment in segments:
        follows = (
            run
            and segment.num_new == run[-1].num_new == 1
            and segment.capacity == run[-1].capacity
            and segment.start == run[-1].start + run[-1].capacity
        )
        if run and not follows:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _mask(run: Sequence[Segment], num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query of a run may see, None where no mask is needed."""
    within = window is None or num_keys <= window
    # Few queries after many cached tokens are cheaper masked than with as many made-up ones before them.
    is_suffix = run[0].num_new > 1 and num_keys > 2 * run[0].num_new
    if within and not is_suffix and (len(run) == 1 or all(s.num_after == num_keys for s in run)):
        return None
    last = torch.tensor([segment.num_after - 1 for segment in run])[:, None, None, None]
    query = last - torch.arange(run[0].num_new - 1, -1, -1)[:, None]
    key = torch.arange(num_keys)
    seen = key <= query if window is None else (key <= query) & (key > query - window)
    return sent(seen, device)


class BlockedAttention:
    """Matrix products a sequence: scores of 128 queries at once, all heads of one query in one product."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        shape = cache.shape
        group = shape.num_heads // shape.num_kv_heads
        self._scale = shape.head_dim**-0.5
        # Which of the key-value heads a query head reads: [heads, kv_heads, 1].
        reads = torch.eye(shape.num_kv_heads, dtype=shape.dtype, device=cache.device)
        self._reads = reads.repeat_interleave(group, 0)[..., None]

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """See RaggedAttention."""
        cache = self._cache
        places = sent(places_of(segments), cache.device)
        counts = [segment.num_new for segment in segments]

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache.write(layer, places, keys, values)
            window = cache.shape.windows[layer]
            gathered = [
                (self._decode if segment.num_new == 1 else self._prefill)(layer, own, segment, window)
                for segment, own in zip(segments, torch.split(queries, counts), strict=True)
            ]
            return torch.cat(gathered)

        return attend

    def _decode(self, layer: int, query: Tensor, segment: Segment, window: int | None) -> Tensor:
        """One token's ``[1, heads * head_dim]``.

        Each head's query stands in the columns of the key-value head that it reads and is zero elsewhere, so
        that one product with the extent, read once from end to end, scores all heads.
        """
        end = segment.start + segment.num_after
        seen = slice(max(segment.start, end - window) if window else segment.start, end)
        keys, values = (of[layer, seen].flatten(1) for of in (self._cache.keys, self._cache.values))
        spread = (query[0, :, None] * self._reads).flatten(1)
        scores = linear(spread, keys).float().mul_(self._scale)
        gathered = (scores.softmax(-1).to(values.dtype) @ values).view(*self._reads.shape[:2], -1)
        return (gathered * self._reads).sum(1).view(1, -1)

    def _prefill(self, layer: int, queries: Tensor, segment: Segment, window: int | None) -> Tensor:
        """A prompt's ``[n, heads * head_dim]``, block by block, each with the keys before its end."""
        num_kv_heads = self._cache.shape.num_kv_heads
        there = slice(segment.start, segment.start + segment.num_after)
        # Products of strided matrices would copy them anew for every block.
        keys = self._cache.keys[layer, there].permute(1, 2, 0).contiguous()
        values = self._cache.values[layer, there].transpose(0, 1).contiguous()
        scaled = queries.transpose(0, 1) * self._scale
        by_head = torch.unflatten(scaled, 0, (num_kv_heads, -1))
        gathered = torch.empty_like(by_head)
        for first in range(0, segment.num_new, BLOCK):
            block = slice(first, min(first + BLOCK, segment.num_new))
            end = segment.num_cached + block.stop
            seen = slice(max(0, end - window - BLOCK) if window else 0, end)
            query = torch.arange(block.start, block.stop) + segment.num_cached
            # Without a window, only the block's own keys can lie after one of its queries.
            doubtful = torch.arange(seen.start, end) if window else query
            gathered[:, :, block] = self._block(
                by_head[:, :, block], keys[..., seen], values[:, seen], _hidden(query, doubtful, window)
            )
        return gathered.permute(2, 0, 1, 3).reshape(segment.num_new, -1)

    def _block(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """``[kv_heads, group, queries, head_dim]`` from scaled queries, turned keys, and values.

        ``hidden`` bool ``[queries, m]`` is about the last m keys.
        """
        scores = torch.bmm(queries.flatten(1, 2), keys)
        by_query = scores.view(*queries.shape[:3], -1)
        by_query[..., -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
        return torch.bmm(scores.softmax(-1), values).view_as(queries)


def _hidden(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Bool ``[queries, keys]``: keys after the query, and those that the window has left behind."""
    hidden = key > query[:, None]
    return hidden if window is None else hidden | (key <= query[:, None] - window)
