"""Places spread evenly over a partition: along its raster order, or over its area."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def evenly_spaced(among: Tensor, counts: Tensor) -> Tensor:
    """Bool like ``among`` ``[..., patches]``: ``counts`` ``[...]`` of them, at even steps in raster order.

    With g * counts patches to choose from these are the first and every g-th after it. ``counts`` may not
    exceed the patches among which to choose.
    """
    place = among.cumsum(-1) - 1
    total = among.sum(-1, keepdim=True).clamp(min=1)
    return among & (place * counts[..., None] % total < counts[..., None])


def cell_centres(real: Tensor, counts: Tensor) -> Tensor:
    """The patch in the middle of each patch's cell, int64 ``[..., patches]``, raster indices.

    ``real`` bool ``[..., patches]`` fills a rectangle of each partition; it is cut into ``counts`` ``[...]``
    cells, as square and as equal as can be: rows into bands, each band into its share of the cells. With
    counts that divide it into squares these are the squares. Patches that are not real get any number.
    """
    side = math.isqrt(real.shape[-1])
    square = real.reshape(*real.shape[:-1], side, side)
    inside_rows, inside_cols = square.any(-1).long(), square.any(-2).long()
    top, left = inside_rows.argmax(-1)[..., None], inside_cols.argmax(-1)[..., None]
    height = inside_rows.sum(-1, keepdim=True).clamp(min=1)
    width = inside_cols.sum(-1, keepdim=True).clamp(min=1)
    count = counts[..., None].clamp(min=1)

    num_bands = (count * height / width.double()).sqrt().round().long()
    num_bands = num_bands.maximum(-(-count // width)).minimum(height).minimum(count)

    index = torch.arange(side * side, device=real.device)
    row, col = index // side - top, index % side - left
    band = row * num_bands // height
    num_cells = (band + 1) * count // num_bands - band * count // num_bands
    num_cells = num_cells.clamp(min=1)  # outside the rectangle there are none
    cell = col * num_cells // width
    middle_row = _middle(band, num_bands, height) + top
    middle_col = _middle(cell, num_cells, width) + left
    return middle_row * side + middle_col


def _middle(part: Tensor, num_parts: Tensor, length: Tensor) -> Tensor:
    """The middle of the numbers from 0 to ``length`` that fall into that one of ``num_parts``."""
    first = -(-part * length // num_parts)
    last = -(-(part + 1) * length // num_parts) - 1
    middle: Tensor = (first + last) // 2
    return middle
