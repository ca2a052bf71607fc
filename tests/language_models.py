"""Tiny language models with random weights, and prompts for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hired.engine import GREEDY, Completion, EngineOptions, Outcome, Request, Sampling
from hired.engine.continuous import ContinuousEngine
from hired.engine.decoder import Decoder
from hired.engine.transformers_engine import TransformersEngine

VOCABULARY, WIDTH, CONTEXT = 90, 32, 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, all heads alike, wide heads, biased": (
        LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}
    ),
    "llama, rope scaled by parts": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA_3_ROPE}),
    "llama, rope scaled evenly, tied": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
         "tie_word_embeddings": True},
    ),
    "mistral, sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, sliding window in one layer": (
        Qwen2ForCausalLM, Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}  # fmt: skip


@cache
def language_model(name: str) -> PreTrainedModel:
    """One model for all tests; whoever takes it apart takes a copy."""
    model, config, changes = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return model(config(**_SHAPE | changes)).eval()


def decode(token_ids: Sequence[int]) -> str:
    """One character a token."""
    return "".join(chr(ord("!") + token_id) for token_id in token_ids)


def decoder(name: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(copy.deepcopy(language_model(name)).to(dtype))


def continuous(
    name: str = "llama",
    *,
    eos_token_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ContinuousEngine:
    """An engine with a cache of a few thousand places, unless the options say otherwise."""
    given = EngineOptions(**{"kv_cache_bytes": 2**21} | options)
    return ContinuousEngine(decoder(name, dtype), eos_token_ids=eos_token_ids, decode=decode, options=given)


def on_transformers(name: str = "llama", *, eos_token_ids: Sequence[int] = ()) -> TransformersEngine:
    return TransformersEngine(language_model(name), eos_token_ids=eos_token_ids, decode=decode)


def request(
    length: int,
    *,
    max_new_tokens: int = 12,
    gap: int = 0,
    stop: tuple[str, ...] = (),
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> Request:
    """A prompt of random embeddings whose positions leap by ``gap`` in the middle."""
    generator = torch.Generator().manual_seed(length if seed is None else seed)
    embeddings = 0.3 * torch.randn(length, WIDTH, generator=generator)
    positions = torch.arange(length)
    positions[length // 2 :] += gap
    return Request(embeddings, positions, max_new_tokens, stop, sampling)


def prefixed(asked: Request, ids: tuple[int, ...], embed: Any) -> Request:
    """The same prompt after the shared prefix ``ids``."""
    embeddings = torch.cat([embed(torch.tensor(ids)), asked.embeddings])
    positions = torch.cat([torch.arange(len(ids)), len(ids) + asked.positions])
    return Request(embeddings, positions, asked.max_new_tokens, asked.stop, asked.sampling, shared_prefix=ids)


def completed(answers: Sequence[Outcome]) -> list[list[int]]:
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return [list(answer.token_ids) for answer in answers if isinstance(answer, Completion)]


@torch.inference_mode()
def without_a_cache(model: PreTrainedModel, request: Request) -> list[int]:
    """Greedy ids from one whole forward a token: nothing is padded, cached or batched."""
    embeddings, positions, ids = request.embeddings[None], request.positions[None], list[int]()
    while len(ids) < request.max_new_tokens:
        mask = torch.ones_like(positions)
        logits: Tensor = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
        ids.append(int(logits[0, -1].argmax()))
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return ids
