"""The order in which visual tokens reach the language model: full-image, canvas rows, newlines, positions.

A language model trained on LLaVA-NeXT sees the full-image in raster order, then the unpadded canvas row by
row across the sub-images, with one learned newline after each row. Every one of these places has a number,
its *slot*; dropping tokens leaves gaps between the slots of those that remain. Sorting by slot orders the
sequence, and the slot itself is the position a token would have had if nothing had been dropped.
With every token kept the result equals transformers' ``LlavaNextModel.pack_image_features``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hired.errors import ConfigurationError
from hired.geometry import unpadded
from hired.types import VisualTokens

Newlines = Literal["rows", "all", "none"]
Positions = Literal["original", "compact"]

NEWLINE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where one image's visual tokens go.

    ``source`` int64 ``[m]`` names the token at each place, ``NEWLINE`` for a newline. ``slots``
    int64 ``[m]``, rising, are the places in the full sequence of ``num_full`` tokens, newlines included.
    """

    source: Tensor
    slots: Tensor
    num_full: int

    def __len__(self) -> int:
        return int(self.source.shape[0])


def layout(tokens: VisualTokens, patches_per_side: int, *, newlines: Newlines = "rows") -> Layout:
    """The places of an image's tokens, on the device where their indices are.

    Newlines close the canvas rows that keep a token (``rows``), ``all`` rows, or ``none``.
    Raises ConfigurationError for tokens that were cut by another tiling.
    """
    box = unpadded(tokens.original_size, tokens.grid, patches_per_side)
    num_full_image = patches_per_side**2
    if tokens.num_before != num_full_image + box.area:
        raise ConfigurationError(
            f"the image had {tokens.num_before} visual tokens before dropping, this model gives it "
            f"{num_full_image + box.area}: encode and generate with the same checkpoint"
        )
    sub_image = tokens.partition - 1
    row = sub_image // tokens.grid.cols * patches_per_side + tokens.patch // patches_per_side - box.top
    col = sub_image % tokens.grid.cols * patches_per_side + tokens.patch % patches_per_side - box.left
    row_length = box.width + 1  # the newline holds a slot even when it is left out
    on_canvas = tokens.partition > 0
    token_slots = torch.where(on_canvas, num_full_image + row * row_length + col, tokens.patch)

    closed_rows = {
        "rows": torch.unique(row[on_canvas]),
        "all": torch.arange(box.height, device=row.device),
        "none": row[:0],
    }[newlines]
    newline_slots = num_full_image + closed_rows * row_length + box.width

    slots, order = torch.sort(torch.cat([token_slots, newline_slots]))
    source = torch.where(order < len(tokens), order, NEWLINE)
    return Layout(source, slots, num_full_image + box.height * row_length)


def pack(layout: Layout, features: Tensor, newline: Tensor) -> Tensor:
    """The visual embeddings ``[m, d]`` from projected features ``[n, d]`` and the newline vector ``[d]``."""
    return torch.cat([features, newline[None].to(features)])[layout.source]  # NEWLINE is the last row


def position_ids(
    num_prefix: int, layout: Layout, num_suffix: int, positions: Positions = "original"
) -> Tensor:
    """Position ids int64 of a whole prompt: text, the image, text. See ``interleaved_position_ids``."""
    return interleaved_position_ids([num_prefix, num_suffix], [layout], positions)


def interleaved_position_ids(
    num_text: Sequence[int], layouts: Sequence[Layout], positions: Positions = "original"
) -> Tensor:
    """Position ids int64 of a whole prompt: text, an image, text, another image and so on, and text.

    ``original`` leaves every token the id it would have with all tokens kept, so that the text after an
    image continues from the full count (arXiv 2506.21873 measures why); ``compact`` counts what is there.
    """
    device = layouts[0].slots.device if layouts else None
    if positions == "compact":
        return torch.arange(sum(num_text) + sum(map(len, layouts)), device=device)
    parts = [torch.arange(num_text[0], device=device)]
    start = num_text[0]
    for layout, num_after in zip(layouts, num_text[1:], strict=True):
        parts.append(start + layout.slots)
        start += layout.num_full
        parts.append(start + torch.arange(num_after, device=device))
        start += num_after
    return torch.cat(parts)
