"""Counted by hand for LLaVA-NeXT-7B, and the ceilings as numbers that can be divided by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hired.embedded.tokenisation import build_tokenizer
from pipeline.benchmark.models import configuration
from pipeline.benchmark.roofline import Ceilings, LanguageModel, Tower, held, measured_ceilings, shapes

# A prompt's text, and the newlines of a square image.
TEXT = 64


@pytest.fixture(scope="module")
def halves() -> tuple[Tower, LanguageModel]:
    return shapes(configuration("7b", build_tokenizer()))


@pytest.mark.parametrize(("num_visual", "tflop"), [(2880, 40.4), (576, 8.4)])
def test_prefill_of_the_7b(halves: tuple[Tower, LanguageModel], num_visual: int, tflop: float) -> None:
    _, language = halves
    assert language.prefill_flops(num_visual + TEXT) / 1e12 == pytest.approx(tflop, abs=0.05)


def test_the_tower_of_the_7b_runs_23_of_24_layers(halves: tuple[Tower, LanguageModel]) -> None:
    tower, _ = halves
    assert tower.num_layers == 23
    assert tower.flops(5) / 1e12 == pytest.approx(1.83, abs=0.005)


def test_keys_and_values_of_the_7b_take_512_kib_a_token(halves: tuple[Tower, LanguageModel]) -> None:
    _, language = halves
    assert language.kv_bytes_per_token(torch.bfloat16) == 512 * 1024
    assert (2880 + TEXT) * language.kv_bytes_per_token(torch.bfloat16) / 1e9 == pytest.approx(1.54, abs=0.005)


def test_the_weights_of_the_7b_are_counted_without_the_embeddings(
    halves: tuple[Tower, LanguageModel],
) -> None:
    _, language = halves
    assert language.weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064


SMALL = LanguageModel(
    hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=10
)


def test_a_step_reads_the_weights_once_and_what_every_sequence_holds() -> None:
    weights = 2 * (8 * 4 * 2 * 3 + 3 * 8 * 16) + 80
    kv = 2 * 2 * 1 * 4 * 2
    assert SMALL.weights == weights
    # Two steps over prompts of 5 and 7: with the token at hand 6 and 8, then 7 and 9.
    assert held([5, 7], 2) == 6 + 8 + 7 + 9
    assert SMALL.decode_bytes(30, 2, torch.bfloat16) == 2 * weights * 2 + 30 * kv
    assert SMALL.decode_flops(30, 4) == 2 * weights * 4 + 4 * 30 * 2 * 2 * 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 9))
def test_decoding_together_reads_less_than_one_after_the_other(lengths: list[int], num_steps: int) -> None:
    apart = sum(
        SMALL.decode_bytes(held([length], num_steps), num_steps, torch.bfloat16) for length in lengths
    )
    together = SMALL.decode_bytes(held(lengths, num_steps), num_steps, torch.bfloat16)
    assert together == apart - (len(lengths) - 1) * num_steps * SMALL.weights * 2


def test_the_slower_of_arithmetic_and_reading_sets_the_time() -> None:
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.seconds(200.0) == 2.0
    assert ceilings.seconds(200.0, 50.0) == 5.0
    assert ceilings | Ceilings(50.0, 20.0) == Ceilings(100.0, 20.0)


def test_ceilings_are_measured_in_the_dtype() -> None:
    ceilings = measured_ceilings(torch.device("cpu"), torch.bfloat16, scale=0.02)
    assert ceilings.flops_per_s > 0
    assert ceilings.bytes_per_s > 0
