"""Tiny LLaVA-NeXT checkpoints with random weights, made on the spot: real files, real processor, no download.

The weights are drawn wide, so that greedy answers are varied and depend on the picture; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

TextFamily = Literal["llama", "mistral"]

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>")
BOS_ID, EOS_ID, PAD_ID, IMAGE_ID = range(len(SPECIAL_TOKENS))

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

LETTERS = ["the quick brown fox jumps over the lazy dog", "what does the sign say", "Describe the picture."]


def tiny_llava_next(
    folder: Path,
    *,
    text: TextFamily = "llama",
    side: int = 48,
    patch_size: int = 12,
    heads: int = 4,
    kv_heads: int | None = None,
    vision_heads: int | None = None,
    pinpoints: Sequence[tuple[int, int]] | None = None,
    layers: int = 2,
    vision_layers: int = 4,
    hidden_size: int = 32,
    max_position_embeddings: int = 2048,
    feature_layer: int = -2,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
) -> Path:
    """The folder, now holding model, tokenizer and processor as ``save_pretrained`` writes them.

    ``heads`` and ``kv_heads`` shape the language model, ``vision_heads`` the tower (as many as ``heads`` by
    default). ``pinpoints`` are ``(rows, cols)`` counted in sub-images: ``[(1, 2), (2, 2)]``.
    """
    grids = pinpoints or [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    canvases = [[rows * side, cols * side] for rows, cols in grids]
    tokenizer = byte_level_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads or heads,
            image_size=side,
            patch_size=patch_size,
            projection_dim=hidden_size,
            initializer_factor=8.0,
        ),
        text_config=_text_config(
            text, len(tokenizer), hidden_size, layers, heads, kv_heads, max_position_embeddings
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=(side // patch_size) ** 2,
        image_grid_pinpoints=canvases,
        vision_feature_layer=feature_layer,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
        _widen(model)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    _processor(tokenizer, side, patch_size, canvases, chat_template).save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 entries: any text goes in and comes out again, after ``<s>``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LETTERS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _text_config(
    family: TextFamily,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    max_position_embeddings: int,
) -> PreTrainedConfig:
    config = {"llama": LlamaConfig, "mistral": MistralConfig}[family]
    return config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=1.5 * hidden_size**-0.5,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def _widen(model: LlavaNextForConditionalGeneration) -> None:
    """Draw the projector wide too: its default spread would drown the picture in the text."""
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    model.tie_weights()


def _processor(
    tokenizer: PreTrainedTokenizerFast,
    side: int,
    patch_size: int,
    canvases: list[list[int]],
    chat_template: str | None,
) -> LlavaNextProcessor:
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=canvases,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
    )
