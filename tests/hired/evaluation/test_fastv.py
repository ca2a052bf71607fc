"""Dropping inside the language model against transformers' layers, run one by one under naive masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

import hired
from hired.errors import ConfigurationError
from hired.evaluation import fastv
from hired.types import VisualTokens
from tests.hired.evaluation.test_likelihood import PROMPT, SIZES, picture
from tests.tiny import EOS_ID, tiny_llava_next

NUM_NEW_TOKENS = 8
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"layers": 4, "seed": 1},
    "mistral, grouped queries": {"text": "mistral", "heads": 4, "kv_heads": 2, "layers": 3, "seed": 4},
}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def vlm(path: Path) -> hired.VLM:
    return hired.load(path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(path: Path) -> LlavaNextForConditionalGeneration:
    return LlavaNextForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def partitions(vlm: hired.VLM) -> list[hired.Partitions]:
    return [vlm.partition(picture(number)) for number in range(len(SIZES))]


def everything(vlm: hired.VLM, partitions: list[hired.Partitions]) -> list[VisualTokens]:
    return vlm.encode(partitions, budget=hired.Budget(rate=1.0), policy="keep-all")


@torch.inference_mode()
def naive(
    model: LlavaNextForConditionalGeneration, embeddings: Tensor, visual: slice, count: int, num_full: int
) -> tuple[list[int], list[int]]:
    """Greedy ids from whole forwards, and the visual tokens that they were left; nothing is cached."""
    language, ids, kept = model.model.language_model, list[int](), list[int]()
    num_prompt = len(embeddings)
    while len(ids) < NUM_NEW_TOKENS:
        n = len(embeddings)
        position = torch.arange(n)[None]
        rotary = language.rotary_emb(embeddings[None], position)
        states, causal = embeddings[None], torch.ones(n, n, dtype=torch.bool).tril()
        for number, layer in enumerate(language.layers):
            mask = causal.clone()
            if number >= num_full:
                dropped = sorted(set(range(visual.start, visual.stop)) - set(kept))
                mask[:, dropped] = False
                mask |= torch.eye(n, dtype=torch.bool)
            added = torch.zeros(n, n).masked_fill(~mask, -torch.inf)[None, None]
            if number == num_full - 1 and not kept:
                _, maps = layer.self_attn(layer.input_layernorm(states), rotary, attention_mask=added)
                received = maps[0].mean(0)[num_prompt - 1, visual]
                kept = sorted((visual.start + received.topk(count).indices).tolist())
            states = layer(states, attention_mask=added, position_ids=position, position_embeddings=rotary)
        ids.append(int(model.lm_head(language.norm(states))[0, -1].argmax()))
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(torch.tensor(ids[-1:]))])
    return (ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids), kept


@pytest.mark.parametrize("num_full", [1, 2])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_answers_equal_those_of_layers_under_naive_masks(
    vlm: hired.VLM,
    model: LlavaNextForConditionalGeneration,
    partitions: list[hired.Partitions],
    rate: float,
    num_full: int,
) -> None:
    budget = hired.Budget(rate=rate)
    tokens = everything(vlm, partitions)
    captions = fastv.generate(
        vlm, tokens, PROMPT, budget, max_new_tokens=NUM_NEW_TOKENS, num_full_layers=num_full
    )
    prefix, suffix = vlm.generator.prompts.split(PROMPT)
    for image, caption in zip(tokens, captions, strict=True):
        embeddings = vlm.generator.request(image, PROMPT).embeddings
        visual = slice(len(prefix), len(embeddings) - len(suffix))
        count = budget.num_tokens(visual.stop - visual.start)
        ids, kept = naive(model, embeddings, visual, count, num_full)
        assert list(caption.token_ids) == ids
        assert caption.visual_tokens_kept == len(kept) == count
        assert caption.prompt_tokens == len(embeddings)


def test_with_all_tokens_kept_answers_are_the_engines(
    vlm: hired.VLM, partitions: list[hired.Partitions]
) -> None:
    prompts = [PROMPT, "?", "Describe the picture.", "the fox"]
    limits = [NUM_NEW_TOKENS, 1, 3, 12]
    tokens = everything(vlm, partitions)
    own = fastv.generate(vlm, tokens, prompts, hired.Budget(rate=1.0), max_new_tokens=limits)
    assert own == vlm.generate(tokens, prompts, max_new_tokens=limits)


def test_company_changes_no_answer(
    vlm: hired.VLM, partitions: list[hired.Partitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, budget = everything(vlm, partitions), hired.Budget(rate=0.2)
    together = fastv.generate(vlm, tokens, PROMPT, budget, max_new_tokens=NUM_NEW_TOKENS)
    monkeypatch.setattr("hired.evaluation.language.MAX_TOKENS", 1)
    assert together == fastv.generate(vlm, tokens, PROMPT, budget, max_new_tokens=NUM_NEW_TOKENS)


def test_what_its_prefill_costs_is_a_mean_over_layers() -> None:
    cost = fastv.mean_visual_tokens(600, 100, num_layers=32, num_full_layers=2)
    assert cost == pytest.approx((2 * 600 + 30 * 100) / 32)


@pytest.mark.parametrize("num_full", [0, 4])
def test_a_model_without_a_layer_to_rank_by_or_drop_in_is_refused(vlm: hired.VLM, num_full: int) -> None:
    with pytest.raises(ConfigurationError, match="give 1 to"):
        fastv.generate(vlm, [], PROMPT, hired.Budget(rate=0.5), num_full_layers=num_full)
