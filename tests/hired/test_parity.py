"""Our path against transformers' own, greedy and in float32, token for token.

Keeping all tokens must give what ``LlavaNextForConditionalGeneration.generate`` gives from the processor's
pixels. Dropping some must give what transformers gives for the same remaining embeddings: its ``generate``
where positions are compact, a forward a token without any cache where they keep their gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, LlavaNextForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hired
from hired import families
from hired.types import VisualTokens
from tests.tiny import tiny_llava_next

KEEP_ALL = hired.Budget(rate=1.0)
NUM_NEW_TOKENS = 16
PROMPT = "What does the sign say?"

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"seed": 1},
    "llama, grouped queries, one vision head": {
        "heads": 8, "kv_heads": 2, "vision_heads": 1, "side": 40, "patch_size": 8,
        "pinpoints": [(1, 1), (2, 3), (3, 2)], "layers": 3, "seed": 2,
    },
    "llama, patches that leave a rest, early features": {
        "side": 50, "patch_size": 16, "pinpoints": [(2, 2), (1, 4)], "vision_layers": 5,
        "feature_layer": -4, "seed": 3,
    },
    "mistral": {"text": "mistral", "heads": 4, "kv_heads": 2, "side": 42, "patch_size": 14, "seed": 4},
    "mistral, two heads": {
        "text": "mistral", "heads": 2, "pinpoints": [(1, 2), (2, 1), (4, 1)], "feature_layer": -1, "seed": 5,
    },
}  # fmt: skip

EMBEDDED = Path(hired.__file__).parent / "embedded" / "checkpoint"
if (EMBEDDED / "config.json").is_file():
    CHECKPOINTS["embedded"] = {}

SIZES = {
    "square": (96, 96),
    "wide": (40, 200),
    "tall": (230, 50),
    "padded": (100, 130),
    "small": (20, 17),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, loaded by us and by transformers."""

    vlm: hired.VLM
    processor: Any
    model: LlavaNextForConditionalGeneration

    def inputs(self, image: Image.Image, prompt: str) -> Any:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def generate(self, **inputs: Any) -> tuple[int, ...]:
        """Transformers' greedy ids without the prompt and without the closing end of sequence."""
        num_prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        ids = self.model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)[
            0, num_prompt:
        ].tolist()
        return tuple(ids[:-1] if ids[-1] == self.eos_token_id else ids)

    @property
    def eos_token_id(self) -> int:
        eos = self.model.generation_config.eos_token_id
        assert isinstance(eos, int)
        return eos


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = checkpoint(request.param, tmp_path_factory)
    processor = AutoProcessor.from_pretrained(path)
    # Pillow's resampling on both sides: torchvision's, which AutoProcessor prefers, rounds otherwise.
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    model = LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return Pair(hired.load(path, device="cpu", dtype=torch.float32), processor, model)


def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if name == "embedded":
        return EMBEDDED
    return tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[name])


def picture(name: str) -> Image.Image:
    """Soft blotches of colour, others for each name."""
    height, width = SIZES[name]
    noise = np.random.default_rng(len(name)).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(vlm: hired.VLM, names: Sequence[str], budget: hired.Budget, policy: str) -> list[VisualTokens]:
    return vlm.encode([vlm.partition(picture(name)) for name in names], budget=budget, policy=policy)


@pytest.mark.parametrize("name", SIZES)
def test_keeping_all_tokens_equals_generate(pair: Pair, name: str) -> None:
    expected = pair.generate(**pair.inputs(picture(name), PROMPT))

    tokens = encode(pair.vlm, [name], KEEP_ALL, "keep-all")
    [caption] = pair.vlm.generate(tokens, [PROMPT], max_new_tokens=NUM_NEW_TOKENS)
    assert caption.token_ids == expected
    assert caption.visual_tokens_kept == caption.visual_tokens_full


def test_a_mixed_batch_equals_generate_image_by_image(pair: Pair) -> None:
    prompts = ["?", PROMPT, "Describe the picture in one sentence.", "Is it red?", "漢字"]
    expected = [
        pair.generate(**pair.inputs(picture(name), prompt))
        for name, prompt in zip(SIZES, prompts, strict=True)
    ]

    tokens = encode(pair.vlm, list(SIZES), KEEP_ALL, "keep-all")
    captions = pair.vlm.generate(tokens, prompts, max_new_tokens=NUM_NEW_TOKENS)
    assert [caption.token_ids for caption in captions] == expected


def test_prompt_lengths_are_those_of_the_processor(pair: Pair) -> None:
    for name in SIZES:
        inputs = pair.inputs(picture(name), PROMPT)
        [caption] = pair.vlm.generate(
            encode(pair.vlm, [name], KEEP_ALL, "keep-all"), [PROMPT], max_new_tokens=1
        )

        assert caption.prompt_tokens == inputs.input_ids.shape[1]
        assert caption.visual_tokens_full == int((inputs.input_ids == pair.model.config.image_token_id).sum())


@torch.inference_mode()
def surviving(pair: Pair, tokens: VisualTokens, inputs: Any) -> tuple[Tensor, Tensor]:
    """Transformers' packed embeddings of the surviving tokens, and where they lie in its full sequence.

    Packing each token's own number instead of its features tells which place it has; a newline survives
    when a token of its row does.
    """
    config = pair.model.config
    num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    numbers = torch.arange(tokens.grid.num_partitions * num_patches, dtype=torch.float64).view(
        -1, num_patches, 1
    )
    packed, _ = pair.model.pack_image_features(
        [numbers], inputs.image_sizes, "default", image_newline=torch.tensor([-1.0], dtype=torch.float64)
    )
    kept = {int(p) * num_patches + int(j) for p, j in zip(tokens.partition, tokens.patch, strict=True)}
    places: list[int] = []
    row: list[int] = []
    for place, number in enumerate(packed[0].flatten().tolist()):
        if number == -1:
            places += [*row, place] if row else []
            row = []
        elif number in kept:
            (places if number < num_patches else row).append(place)
    full = pair.model.get_image_features(inputs.pixel_values, inputs.image_sizes).pooler_output[0]
    return full[places], torch.tensor(places)


@pytest.mark.parametrize("policy", ["hired", "hired-reference"])
def test_dropped_prompts_with_compact_positions_equal_generate_on_the_same_embeddings(
    pair: Pair, policy: str
) -> None:
    generator = families.load_generator(pair.vlm.path, device="cpu", dtype="float32", positions="compact")
    tokens = encode(pair.vlm, list(SIZES), hired.Budget(rate=0.3), policy)
    answers = generator.generate(tokens, [PROMPT] * len(SIZES), max_new_tokens=NUM_NEW_TOKENS)

    for name, image, answer in zip(SIZES, tokens, answers, strict=True):
        inputs = pair.inputs(picture(name), PROMPT)
        embeddings, _ = surviving(pair, image, inputs)
        ids = with_image_tokens(inputs.input_ids[0], pair.model.config.image_token_id, len(embeddings))
        expected = pair.generate(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[embeddings])},
        )
        assert isinstance(answer, hired.Caption)
        assert answer.token_ids == expected
        assert answer.prompt_tokens == len(ids)


def test_dropped_prompts_with_original_positions_equal_a_loop_without_a_cache(pair: Pair) -> None:
    tokens = encode(pair.vlm, list(SIZES), hired.Budget(rate=0.3), "hired")
    captions = pair.vlm.generate(tokens, [PROMPT] * len(SIZES), max_new_tokens=NUM_NEW_TOKENS)

    for name, image, caption in zip(SIZES, tokens, captions, strict=True):
        inputs = pair.inputs(picture(name), PROMPT)
        embeddings, places = surviving(pair, image, inputs)
        ids, image_id = inputs.input_ids[0], pair.model.config.image_token_id
        kept = ids != image_id
        kept[(~kept).nonzero()[places, 0]] = True
        text = pair.model.get_input_embeddings()(ids[kept])
        text[ids[kept] == image_id] = embeddings
        assert caption.token_ids == without_a_cache(pair, text, kept.nonzero()[:, 0])


def with_image_tokens(ids: Tensor, image_token_id: int, number: int) -> Tensor:
    """The prompt's ids with ``number`` image tokens in place of the full count."""
    image = (ids == image_token_id).nonzero()[:, 0]
    return torch.cat([ids[: image[0]], ids[image[:1]].expand(number), ids[image[-1] + 1 :]])


@torch.inference_mode()
def without_a_cache(pair: Pair, embeddings: Tensor, positions: Tensor) -> tuple[int, ...]:
    """Greedy ids from one whole forward a token at explicit positions."""
    ids: list[int] = []
    while len(ids) < NUM_NEW_TOKENS:
        mask = torch.ones_like(positions)[None]
        output = pair.model(inputs_embeds=embeddings[None], attention_mask=mask, position_ids=positions[None])
        if (token_id := int(output.logits[0, -1].argmax())) == pair.eos_token_id:
            break
        ids.append(token_id)
        embeddings = torch.cat([embeddings, pair.model.get_input_embeddings()(torch.tensor([token_id]))])
        positions = torch.cat([positions, positions[-1:] + 1])
    return tuple(ids)
