"""Tiny CLIP towers with random weights whose CLS token looks at some patches far more than at others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hired.encoder import Encoder
from hired.geometry import Tiling
from hired.types import Size

IMAGE_MEAN, IMAGE_STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


def tiny_tower(
    *, side: int = 32, patch_size: int = 8, heads: int = 4, layers: int = 4, seed: int = 0
) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=16 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch_size,
        initializer_factor=4.0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
        for layer in tower.encoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                torch.nn.init.normal_(projection.weight, std=1.3 * config.hidden_size**-0.5)
    return tower.eval()


def tiling_of(tower: CLIPVisionModel, grids: tuple[tuple[int, int], ...] = GRIDS) -> Tiling:
    side = tower.config.image_size
    pinpoints = tuple(Size(rows * side, cols * side) for rows, cols in grids)
    return Tiling(side, tower.config.patch_size, pinpoints)


def encoder_of(
    tower: CLIPVisionModel, *, grids: tuple[tuple[int, int], ...] = GRIDS, **options: Any
) -> Encoder:
    defaults: dict[str, Any] = {
        "feature_layer": -2,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "handoff_dtype": torch.float32,
    }
    return Encoder(tower, tiling_of(tower, grids), **(defaults | options))
