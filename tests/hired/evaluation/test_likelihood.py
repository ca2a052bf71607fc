"""The likelihood of an answer against transformers' own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaNextForConditionalGeneration

import hired
from hired.errors import CapacityError, ConfigurationError
from hired.evaluation.language import groups
from hired.evaluation.likelihood import answer_ids, log_likelihoods
from hired.types import VisualTokens
from tests.tiny import EOS_ID, tiny_llava_next

PROMPT = "What does the sign say?"
SIZES = ((96, 96), (40, 200), (230, 50), (100, 130))
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"seed": 1},
    "llama, grouped queries": {"heads": 8, "kv_heads": 2, "layers": 3, "seed": 2},
    "mistral": {"text": "mistral", "heads": 4, "kv_heads": 2, "side": 42, "patch_size": 14, "seed": 4},
}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def vlm(path: Path) -> hired.VLM:
    return hired.load(path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(path: Path) -> LlavaNextForConditionalGeneration:
    return LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def picture(number: int) -> Image.Image:
    height, width = SIZES[number]
    noise = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(vlm: hired.VLM, rate: float, policy: str) -> list[VisualTokens]:
    cut = [vlm.partition(picture(number)) for number in range(len(SIZES))]
    return vlm.encode(cut, budget=hired.Budget(rate=rate), policy=policy)


@torch.inference_mode()
def test_with_all_tokens_kept_it_equals_that_of_transformers(
    path: Path, vlm: hired.VLM, model: LlavaNextForConditionalGeneration
) -> None:
    processor = AutoProcessor.from_pretrained(path)
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    answer = "the quick fox"
    ids = torch.tensor(answer_ids(vlm, answer))
    assert ids[-1] == EOS_ID
    told = log_likelihoods(vlm, encoded(vlm, 1.0, "keep-all"), PROMPT, answer)
    for number, log_likelihood in enumerate(told):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [
                {"type": "image", "image": picture(number)}, {"type": "text", "text": PROMPT}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        whole = torch.cat([inputs.input_ids, ids[None]], dim=1)
        logits = model(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            pixel_values=inputs.pixel_values,
            image_sizes=inputs.image_sizes,
        ).logits[0, -len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(log_likelihood, expected, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_with_tokens_dropped_it_equals_a_forward_of_transformers_at_the_same_positions(
    vlm: hired.VLM, model: LlavaNextForConditionalGeneration
) -> None:
    answers = ["a fox", "What", "", "0123456789"]
    tokens = encoded(vlm, 0.3, "hired")
    told = log_likelihoods(vlm, tokens, [PROMPT, "?", "Is it red?", PROMPT], answers)
    for image, prompt, answer, log_likelihood in zip(
        tokens, [PROMPT, "?", "Is it red?", PROMPT], answers, told, strict=True
    ):
        ids = torch.tensor(answer_ids(vlm, answer))
        request = vlm.generator.request(image, prompt)
        embeddings = torch.cat([request.embeddings, model.get_input_embeddings()(ids)])[None]
        positions = torch.cat([request.positions, request.positions[-1] + 1 + torch.arange(len(ids))])[None]
        logits = model(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(positions), position_ids=positions
        ).logits[0, -len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(log_likelihood, expected, atol=2e-4, rtol=1e-4)


def test_company_changes_nothing(vlm: hired.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = encoded(vlm, 0.3, "hired")
    together = log_likelihoods(vlm, tokens, PROMPT, "a fox")
    monkeypatch.setattr("hired.evaluation.language.MAX_TOKENS", 1)
    for image, log_likelihood in zip(tokens, together, strict=True):
        [alone] = log_likelihoods(vlm, [image], PROMPT, "a fox")
        torch.testing.assert_close(log_likelihood, alone, atol=1e-5, rtol=1e-5)


def test_the_models_own_greedy_answer_has_the_likeliest_first_token(vlm: hired.VLM) -> None:
    tokens = encoded(vlm, 0.3, "hired")
    captions = vlm.generate(tokens, PROMPT, max_new_tokens=1)
    own = log_likelihoods(vlm, tokens, PROMPT, captions)
    for letter in "abcdefgh":
        other = log_likelihoods(vlm, tokens, PROMPT, letter)
        assert all(mine[0] >= theirs[0] - 1e-5 for mine, theirs in zip(own, other, strict=True))


def test_an_answer_that_was_cut_off_is_not_expected_to_end() -> None:
    def caption(finish_reason: Any) -> hired.Caption:
        return hired.Caption("", (7, 8), finish_reason, 9, 9, 9)

    class Prompts:
        def answer_ids(self, text: str) -> tuple[int, ...]:
            return (EOS_ID,)

    class Face:
        generator = type("G", (), {"prompts": Prompts()})()

    assert answer_ids(Face(), caption("stop")) == (7, 8, EOS_ID)  # type: ignore[arg-type]
    assert answer_ids(Face(), caption("length")) == (7, 8)  # type: ignore[arg-type]


def test_an_answer_beyond_the_context_is_refused(vlm: hired.VLM) -> None:
    with pytest.raises(CapacityError, match="context"):
        log_likelihoods(vlm, encoded(vlm, 0.3, "hired"), PROMPT, "a" * 3000)


def test_an_engine_that_shows_nothing_is_refused_with_the_mend(path: Path) -> None:
    vlm = hired.load(path, device="cpu", engine=hired.EngineOptions(name="transformers"))
    with pytest.raises(ConfigurationError, match="continuous"):
        log_likelihoods(vlm, encoded(vlm, 0.3, "hired"), PROMPT, "a")


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], []), ([5], [[5]]), ([20], [[20]]), ([4, 6, 1, 30, 2, 2], [[4, 6], [1], [30], [2, 2]])],
)
def test_groups_are_neighbours_within_the_bound(lengths: list[int], expected: list[Sequence[int]]) -> None:
    assert [lengths[some] for some in groups(lengths, 10)] == expected
