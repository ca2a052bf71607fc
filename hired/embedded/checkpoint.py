"""The embedded model as files: what any LLaVA-NeXT checkpoint is made of."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hired.embedded import painter
from hired.embedded.supervision import PATCH
from hired.embedded.tokenisation import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD

TRAINING = "training.json"

_CANVASES = [[size.height, size.width] for size in painter.PINPOINTS]
_MAX_POSITIONS = 4096


def configuration(tokenizer: Any) -> LlavaNextConfig:
    """A CLIP tower of 192 px / patch 16, 192 wide, and a Llama 256 wide: 6 million parameters."""
    pad, bos, eos, image = tokenizer.convert_tokens_to_ids([PAD, BOS, EOS, IMAGE])
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=painter.SIDE,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_MAX_POSITIONS,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_grid_pinpoints=_CANVASES,
        image_token_index=image,
        image_seq_length=(painter.SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def new_model(tokenizer: Any, *, seed: int) -> LlavaNextForConditionalGeneration:
    """Random weights. Attention is eager, whose backward pass is the faster one on CPUs."""
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration._from_config(
        configuration(tokenizer), attn_implementation="eager"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A saved checkpoint's state dict, in float32, to train on from."""
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


def save(model: LlavaNextForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Model in float16, tokenizer, processor and generation settings, as ``save_pretrained`` writes them."""
    shipped = copy.deepcopy(model).half()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shipped.generation_config = GenerationConfig(**ids)
    shipped.save_pretrained(folder)
    save_processor(shipped.config, tokenizer, folder, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])


def training(folder: Path) -> dict[str, Any] | None:
    """The record that jobs/train_embedded.py left beside the weights, None for any other checkpoint."""
    file = folder / TRAINING
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def save_processor(
    config: LlavaNextConfig, tokenizer: Any, folder: Path, **normalisation: Sequence[float]
) -> None:
    """Tokenizer, chat template and an image processor that cuts pictures as ``config`` says.

    ``normalisation`` is ``image_mean`` and ``image_std``; without them CLIP's.
    """
    side = config.vision_config.image_size
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        **normalisation,
    )
    LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
