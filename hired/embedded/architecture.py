"""The embedded model's shape: a small LLaVA-NeXT in transformers' own configuration classes."""

from __future__ import annotations

from typing import Any

from hired.embedded import painter


def configuration(vocab_size: int, special: dict[str, int]) -> Any:
    """A ``LlavaNextConfig``: CLIP tower 192 px / patch 16, Llama 256 wide. ``special`` maps pad, bos, eos and
    image to token ids."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=painter.SIDE,
        patch_size=16,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=special["pad"],
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        tie_word_embeddings=False,
    )
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_grid_pinpoints=[[size.height, size.width] for size in painter.PINPOINTS],
        image_token_index=special["image"],
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
