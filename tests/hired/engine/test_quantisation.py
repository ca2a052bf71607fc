"""Weights of eight bits answer nearly as the full ones do, and take half the memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hired.engine.decoder import Decoder
from hired.engine.kv_cache import KVCache, Segment
from hired.engine.ragged_attention import ragged_attention
from hired.errors import ConfigurationError
from tests.language_models import completed, continuous, language_model, request


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `make setup` puts torchao, apart from the packages that all tests see."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / ".venv" / "torchao"))


def logits(decoder: Decoder) -> torch.Tensor:
    cache = KVCache(decoder.shape, 128, torch.device("cpu"))
    extent = cache.arena.allocate(20)
    assert extent is not None
    asked = request(20)
    attend = ragged_attention(cache).attend([Segment(extent, 0, 20)])
    with torch.inference_mode():
        return decoder.logits(decoder.forward(asked.embeddings, asked.positions, attend))


def test_eight_bits_are_close_to_the_full_weights() -> None:
    full = logits(Decoder(copy.deepcopy(language_model("llama"))))
    quantised = logits(Decoder(copy.deepcopy(language_model("llama")), quantisation="int8"))

    assert 0 < (quantised - full).abs().mean() < 0.05 * full.std()


def test_an_engine_answers_with_eight_bits() -> None:
    engine = continuous()
    engine.decoder = Decoder(copy.deepcopy(language_model("llama")), quantisation="int8")
    assert [len(ids) for ids in completed(engine.generate([request(9), request(3)]))] == [12, 12]


def test_four_bits_on_a_host_are_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="int8"):
        Decoder(copy.deepcopy(language_model("llama")), quantisation="int4")
