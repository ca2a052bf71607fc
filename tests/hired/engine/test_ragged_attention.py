"""Attention over the arena against the plainest reading: one sequence, one query, one head at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hired.engine.decoder import Shape
from hired.engine.kv_cache import KVCache, Segment
from hired.engine.ragged_attention import (
    BlockedAttention,
    FusedAttention,
    RaggedAttention,
    VarlenAttention,
    ragged_attention,
)

HEAD_DIM = 8
Lengths = list[tuple[int, int]]  # tokens that were there before, new tokens

WAYS = [
    pytest.param(FusedAttention, torch.float32, 1e-5, id="fused"),
    pytest.param(BlockedAttention, torch.float32, 1e-5, id="blocked"),
    pytest.param(BlockedAttention, torch.bfloat16, 3e-2, id="blocked-bfloat16"),
]


def naive(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """``[n, heads, d]`` for the last n of the tokens in ``[k, kv_heads, d]``."""
    group = queries.shape[1] // keys.shape[1]
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for i in range(len(queries)):
        at = len(keys) - len(queries) + i
        first = max(0, at - window + 1) if window else 0
        for head in range(queries.shape[1]):
            own_keys = keys[first : at + 1, head // group].double()
            scores = own_keys @ queries[i, head].double() / HEAD_DIM**0.5
            out[i, head] = scores.softmax(0) @ values[first : at + 1, head // group].double()
    return out


def check(
    way: Callable[[KVCache], RaggedAttention],
    lengths: Lengths,
    *,
    heads: tuple[int, int],
    window: int | None,
    dtype: torch.dtype,
    tolerance: float,
    device: str = "cpu",
) -> None:
    """Fills a cache with what was there before, runs one pass, and compares."""
    num_heads, num_kv_heads = heads
    shape = Shape(2, num_heads, num_kv_heads, HEAD_DIM, (None, window), dtype)
    cache = KVCache(shape, 8192, torch.device(device))
    generator = torch.Generator().manual_seed(3)

    def random(n: int, heads: int) -> Tensor:
        return torch.randn(n, heads, HEAD_DIM, generator=generator).to(device, dtype)

    segments, queries, keys, values = [], [], [], []
    for before, new in lengths:
        extent = cache.arena.allocate(before + new + 3)
        assert extent is not None
        segments.append(Segment(extent, before, new))
        queries.append(random(new, num_heads))
        keys.append(random(before + new, num_kv_heads))
        values.append(random(before + new, num_kv_heads))
        for layer in range(2):
            cache.keys[layer, extent.start : extent.start + before] = keys[-1][:before]
            cache.values[layer, extent.start : extent.start + before] = values[-1][:before]
    attend = way(cache).attend(segments)
    new_keys, new_values = (
        torch.cat([of[before:] for of, (before, _) in zip(all_of, lengths, strict=True)])
        for all_of in (keys, values)
    )
    for layer in range(2):
        gathered = attend(layer, torch.cat(queries), new_keys, new_values).unflatten(-1, (-1, HEAD_DIM))
        expected = torch.cat(
            [
                naive(q.cpu(), k.cpu(), v.cpu(), shape.windows[layer])
                for q, k, v in zip(queries, keys, values, strict=True)
            ]
        )
        assert (gathered.cpu().double() - expected).abs().max() < tolerance


@pytest.mark.parametrize(("way", "dtype", "tolerance"), WAYS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 5])
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 7])).filter(sum), min_size=1, max_size=6
    )
)
def test_passes_of_prompts_and_last_tokens(
    way: Callable[[KVCache], RaggedAttention],
    dtype: torch.dtype,
    tolerance: float,
    heads: tuple[int, int],
    window: int | None,
    lengths: Lengths,
) -> None:
    check(way, lengths, heads=heads, window=window, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(("way", "dtype", "tolerance"), WAYS)
@pytest.mark.parametrize("lengths", [[(0, 300), (130, 1), (7, 129)], [(200, 257)], [(64, 1)] * 4 + [(9, 1)]])
@pytest.mark.parametrize("window", [None, 100])
def test_prompts_of_several_blocks(
    way: Callable[[KVCache], RaggedAttention],
    dtype: torch.dtype,
    tolerance: float,
    lengths: Lengths,
    window: int | None,
) -> None:
    check(way, lengths, heads=(2, 1), window=window, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, FusedAttention),
        (torch.bfloat16, BlockedAttention),
        (torch.float16, BlockedAttention),
    ],
)
def test_the_way_follows_from_device_and_dtype(dtype: torch.dtype, expected: type) -> None:
    cache = KVCache(Shape(1, 2, 2, HEAD_DIM, (None,), dtype), 64, torch.device("cpu"))
    assert type(ragged_attention(cache)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[(0, 300), (130, 1), (7, 129)], [(200, 257)], [(64, 1)] * 4 + [(9, 1)]])
@pytest.mark.parametrize("window", [None, 100])
def test_one_kernel_for_all_sequences(dtype: torch.dtype, lengths: Lengths, window: int | None) -> None:
    check(VarlenAttention, lengths, heads=(4, 2), window=window, dtype=dtype, tolerance=3e-2, device="cuda")
