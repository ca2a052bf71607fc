from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hired.attention import Attention, attention_in_blocks, most_attended
from tests.towers import tiny_tower


@pytest.mark.parametrize("heads", [1, 3, 4])
class TestAttention:
    def test_the_cls_row_equals_that_of_the_whole_map(self, heads: int) -> None:
        attention, (_, maps) = attentions(heads)
        torch.testing.assert_close(attention.from_cls(), maps[:, :, 0, 1:].sum(1), atol=1e-6, rtol=1e-5)

    def test_the_context_equals_that_of_the_layer(self, heads: int) -> None:
        attention, (output, _) = attentions(heads)
        projected = tower_attention(heads).out_proj(attention.context())
        torch.testing.assert_close(projected, output, atol=1e-5, rtol=1e-5)

    def test_attention_is_summed_in_float32_whatever_the_layer_runs_in(self, heads: int) -> None:
        module = tower_attention(heads).bfloat16()
        assert Attention.of(module, states(heads).bfloat16()).from_cls().dtype == torch.float32


class TestAttentionInBlocks:
    @given(
        n=st.integers(1, 3),
        heads=st.integers(1, 4),
        tokens=st.integers(1, 20),
        d_head=st.integers(1, 8),
        block_bytes=st.integers(0, 20_000),
        seed=st.integers(0, 99),
    )
    def test_it_equals_fused_attention_whatever_the_blocks(
        self, n: int, heads: int, tokens: int, d_head: int, block_bytes: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        # As a layer makes them: heads split from the last dimension, so not contiguous.
        queries, keys, values = (
            torch.randn(n, tokens, heads, d_head, generator=generator).transpose(1, 2) for _ in range(3)
        )
        expected = scaled_dot_product_attention(queries, keys, values, scale=0.3)
        blocks = attention_in_blocks(queries, keys, values, scale=0.3, block_bytes=block_bytes)
        torch.testing.assert_close(blocks, expected, atol=1e-6, rtol=1e-5)

    def test_in_bfloat16_it_is_as_close_to_float32_as_fused_attention(self) -> None:
        generator = torch.Generator().manual_seed(0)
        exact = [torch.randn(2, 3, 100, 16, generator=generator) for _ in range(3)]
        rounded = [tensor.bfloat16() for tensor in exact]
        expected = scaled_dot_product_attention(*(tensor.float() for tensor in rounded), scale=0.25)
        fused = (scaled_dot_product_attention(*rounded, scale=0.25) - expected).abs().mean()
        blocks = (attention_in_blocks(*rounded, scale=0.25) - expected).abs().mean()
        assert blocks < 2 * fused

    @pytest.mark.parametrize("slow", [False, True])
    def test_a_bfloat16_layer_gathers_the_same_either_way(
        self, slow: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hired.attention._FUSED_IS_SLOW_IN_BFLOAT16", slow)
        with torch.no_grad():
            attention = Attention.of(tower_attention(4).bfloat16(), states(4).bfloat16())
            expected = Attention.of(tower_attention(4), states(4)).context()
            torch.testing.assert_close(attention.context().float(), expected, atol=0.1, rtol=0.1)


def tower_attention(heads: int) -> torch.nn.Module:
    tower = tiny_tower(heads=heads)
    tower.set_attn_implementation("eager")
    return tower.encoder.layers[1].self_attn


def states(heads: int) -> torch.Tensor:
    return torch.randn(3, 17, 16 * heads, generator=torch.Generator().manual_seed(0))


def attentions(heads: int) -> tuple[Attention, tuple[torch.Tensor, torch.Tensor]]:
    module = tower_attention(heads)
    with torch.no_grad():
        return Attention.of(module, states(heads)), module(states(heads), attention_mask=None)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[list[float], list[bool], int]:
    """Attention with many ties, which patches are real, and how many of those to choose."""
    attention = draw(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), min_size=1, max_size=20))
    real = draw(st.lists(st.booleans(), min_size=len(attention), max_size=len(attention)))
    return attention, real, draw(st.integers(0, sum(real)))


class TestMostAttended:
    @given(st.lists(partitions(), min_size=1, max_size=1))
    def test_it_equals_sorting_patch_by_patch(self, rows: list[tuple[list[float], list[bool], int]]) -> None:
        [(attention, real, count)] = rows
        best_first = sorted((j for j in range(len(real)) if real[j]), key=lambda j: (-attention[j], j))
        kept = most_attended(torch.tensor(attention), torch.tensor(count), among=torch.tensor(real))
        assert kept.nonzero()[:, 0].tolist() == sorted(best_first[:count])

    def test_of_equals_the_first_is_kept(self) -> None:
        attention = torch.ones(2, 3, 600)
        counts = torch.tensor([[0, 1, 300], [2, 600, 5]])
        kept = most_attended(attention, counts, among=torch.ones(2, 3, 600, dtype=torch.bool))
        assert kept.equal(torch.arange(600) < counts[..., None])
