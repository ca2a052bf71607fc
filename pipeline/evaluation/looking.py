"""The section ``attention``: the paper's figures 2 and 3 and its table 2 on the pictures of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import hired
from hired.budget import Budget
from hired.errors import ConfigurationError
from hired.evaluation.items import Picture
from hired.evaluation.looking import (
    attention_to_image,
    full_image_maps,
    most_attended_by_partition,
    share_of_top,
)
from hired.types import Grid
from hired.vlm import VLM
from pipeline.evaluation.asking import Worker

PROMPT = "Describe the image."
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TOP = (0.1, 0.2)
GRID = Grid(2, 2)
NUM_EXAMPLES = 3


def look(worker: Worker, pictures: Sequence[Picture]) -> dict[str, Any]:
    """The record of the section; maps are of the first pictures that have the grid."""
    vlm = hired.load(worker.checkpoint, device=worker.device, dtype=worker.dtype)
    partitions = [vlm.partition(picture.data) for picture in pictures]
    suiting = [image for image in partitions if image.grid == GRID]
    by_partition = {
        f"{share:g}": _rounded(most_attended_by_partition(vlm.encoder, partitions, grid=GRID, share=share))
        for share in TOP
    }
    return {
        "pictures": len(pictures),
        "of_grid": len(suiting),
        "layers": vlm.encoder.feature_layer + 1,
        "language_model": _to_image(vlm, partitions),
        "by_partition": by_partition,
        "maps": [
            {
                "picture": picture.key,
                "layers": [_rounded(each, 5) for each in full_image_maps(vlm.encoder, image)],
            }
            for picture, image in list(zip(pictures, partitions, strict=True))[:NUM_EXAMPLES]
        ],
    }


def _to_image(vlm: VLM, partitions: Sequence[Any]) -> dict[str, Any] | str:
    """The share of attention that top tokens hold, a mean over pictures; or why it cannot be had."""
    shares: dict[float, list[float]] = {share: [] for share in SHARES}
    try:
        for image in partitions:
            [tokens] = vlm.encode([image], budget=Budget(rate=1.0), policy="keep-all")
            weights = attention_to_image(vlm, tokens, PROMPT)
            for share, values in shares.items():
                values.append(share_of_top(weights, share))
    except ConfigurationError as error:
        return str(error)
    return {f"{share:g}": round(float(np.mean(values)), 4) for share, values in shares.items()}


def _rounded(values: Any, decimals: int = 2) -> Any:
    return None if values is None else np.round(values, decimals).tolist()
