"""Where a model looks: what CLS attends to in the tower, and the last token before an answer in the language
model. The paper's figures 2 and 3 and its table 2, for any model and pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hired.attention import most_attended
from hired.engine.decoder import Decoder
from hired.evaluation.language import attention, decoder_of, gathered, seen
from hired.geometry import real_patches
from hired.types import Grid, Partitions, VisualTokens

if TYPE_CHECKING:
    from hired.encoder import Encoder
    from hired.vlm import VLM

Array = NDArray[np.float64]


def attention_to_image(vlm: VLM, tokens: VisualTokens, prompt: str) -> Array:
    """What the language model attends to when it begins to answer: ``[n]`` of the visual tokens, sum 1.

    That of the prompt's last token, a mean over heads and layers; text and newlines are left out. Raises
    ConfigurationError for an engine that does not show its language model.
    """
    decoder, generator = decoder_of(vlm), vlm.generator
    request = generator.request(tokens, prompt)
    layout = generator.layout(tokens)
    start = len(generator.prompts.split(prompt)[0])
    recording = _LastToken(decoder)
    with torch.inference_mode():
        decoder.forward(request.embeddings, request.positions.to(decoder.device), recording)
    visual = torch.stack(recording.rows).mean(0)[start : start + len(layout)].cpu()
    to_tokens = visual[layout.source.cpu() >= 0].double().numpy()
    weights: Array = to_tokens / to_tokens.sum()
    return weights


class _LastToken:
    """Causal attention of one sequence, which keeps what its last token attends to in each layer."""

    def __init__(self, decoder: Decoder) -> None:
        self._windows = decoder.shape.windows
        self.rows: list[Tensor] = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mask = seen(len(queries), len(keys), self._windows[layer], queries)
        self.rows.append(attention(queries[-1:], keys, mask[-1:])[0])
        return gathered(queries, keys, values, mask)


def share_of_top(weights: Array, share: float) -> float:
    """How much of the attention the ``share`` of all tokens that get most of it hold together."""
    count = max(1, round(share * len(weights)))
    return float(np.sort(weights)[::-1][:count].sum() / weights.sum())


def most_attended_by_partition(
    encoder: Encoder, partitions: Sequence[Partitions], *, grid: Grid, share: float
) -> Array | None:
    """Where the ``share`` of an image's tokens lie that CLS attends to most: a mean count a partition.

    Of the images with this ``grid``; all partitions' patches compete, by the feature layer's attention. The
    full-image comes first. None where no image has the grid.
    """
    suiting = [image for image in partitions if image.grid == grid]
    if not suiting:
        return None
    layer = encoder.feature_layer
    counts = []
    for image, maps in zip(suiting, encoder.cls_attention(suiting, layers=[layer]), strict=True):
        real = real_patches(image.original_size, image.grid, encoder.tiling.patches_per_side)
        count = torch.tensor(round(share * int(real.sum())))
        top = most_attended(maps[layer].flatten(), count, among=real.flatten()).view_as(real)
        counts.append(top.sum(-1).double().numpy())
    mean: Array = np.mean(counts, axis=0)
    return mean


def full_image_maps(encoder: Encoder, image: Partitions) -> list[Array]:
    """What CLS attends to in the full-image, layer by layer up to the feature layer: ``[side, side]``."""
    side = encoder.tiling.patches_per_side
    layers = range(encoder.feature_layer + 1)
    [maps] = encoder.cls_attention([image], layers=layers)
    return [maps[layer][0].view(side, side).double().numpy() for layer in layers]
