"""Checkpoints of random weights in known shapes: what a model costs does not depend on what it has learned.

They are saved once, as real checkpoint folders, and loaded by the same code as any other. They have no end
of sequence, so every answer is exactly as long as it may be.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from hired.embedded.checkpoint import save_processor
from hired.embedded.tokenisation import BOS, IMAGE, PAD, build_tokenizer
from hired.vlm import resolve

SEED = 0
LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

# The tower and the language model of each preset, in the words of their configurations.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Seconds on any machine; for tests.
    "toy": (
        {"hidden_size": 32, "intermediate_size": 64, "layers": 4, "heads": 2, "side": 48, "patch_size": 12},
        {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "vocab_size": 704},
    ),
    # 2880 visual tokens, and a tower that costs 7 % of the prefill, as in the 7B; small enough for a CPU.
    "small": (
        {
            "hidden_size": 384, "intermediate_size": 1536, "layers": 12, "heads": 6,
            "side": 336, "patch_size": 14,
        },
        {"hidden_size": 1024, "intermediate_size": 2816, "layers": 24, "heads": 16, "vocab_size": 32000},
    ),
    # llava-v1.6-vicuna-7b
    "7b": (
        {
            "hidden_size": 1024, "intermediate_size": 4096, "layers": 24, "heads": 16,
            "side": 336, "patch_size": 14,
        },
        {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "vocab_size": 32064},
    ),
}  # fmt: skip

log = logging.getLogger(__name__)


def checkpoint(model: str, cache: Path, device: torch.device) -> Path:
    """The folder of a model: a preset's, made in ``cache`` when it is first asked for, or any that loads."""
    if model not in SHAPES:
        return resolve(model)
    folder = cache / model
    if not folder.is_dir():
        log.info("making the checkpoint %s", folder)
        aside = folder.with_name(f".{model}.unfinished")
        shutil.rmtree(aside, ignore_errors=True)
        _save(model, aside, device)
        aside.rename(folder)
    return folder


def configuration(model: str, tokenizer: Any) -> LlavaNextConfig:
    """The configuration of a preset."""
    tower, language = SHAPES[model]
    pad, bos, image = tokenizer.convert_tokens_to_ids([PAD, BOS, IMAGE])
    vision = CLIPVisionConfig(
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        num_hidden_layers=tower["layers"],
        num_attention_heads=tower["heads"],
        image_size=tower["side"],
        patch_size=tower["patch_size"],
        projection_dim=tower["hidden_size"],
    )
    text = LlamaConfig(
        vocab_size=language["vocab_size"],
        hidden_size=language["hidden_size"],
        intermediate_size=language["intermediate_size"],
        num_hidden_layers=language["layers"],
        num_attention_heads=language["heads"],
        num_key_value_heads=language["heads"],
        max_position_embeddings=4096,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_grid_pinpoints=_canvases(tower["side"]),
        image_token_index=image,
        image_seq_length=(tower["side"] // tower["patch_size"]) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _canvases(side: int) -> list[list[int]]:
    return [[rows * side, cols * side] for rows, cols in LLAVA_NEXT_GRIDS]


def _save(model: str, folder: Path, device: torch.device) -> None:
    """Weights in bfloat16, drawn on ``device`` (a GPU draws seven billion in seconds), and processor."""
    tokenizer = build_tokenizer()
    config = configuration(model, tokenizer)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(SEED)
        weights = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad")}
    weights.generation_config = GenerationConfig(**ids)
    weights.save_pretrained(folder, max_shard_size="4GB")
    save_processor(config, tokenizer, folder)
