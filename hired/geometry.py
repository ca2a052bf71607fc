"""Where things lie: original picture, canvas, sub-images, patches.

A picture is fitted into the best of a few canvases with its aspect kept, padded around its centre, and cut
into a grid of sub-images. The full-image is the same picture squashed to one sub-image's square, unpadded.
Everything here follows transformers' LLaVA-NeXT, floats and rounding included, because a checkpoint was
trained with exactly those rows and columns; the one difference is noted at ``unpadded``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hired.errors import ConfigurationError
from hired.types import Box, Grid, Size

if TYPE_CHECKING:
    import torch  # and in the functions that need it: a process that only decodes is ready sooner without


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a checkpoint cuts pictures.

    ``side`` of a sub-image and ``patch_size`` in pixels; ``pinpoints`` are the canvases to choose from.
    """

    side: int
    patch_size: int
    pinpoints: tuple[Size, ...]

    def __post_init__(self) -> None:
        if not 0 < self.patch_size <= self.side:
            raise ConfigurationError(
                f"patches of {self.patch_size} px do not fit sub-images of {self.side} px"
            )
        if not self.pinpoints:
            raise ConfigurationError("a tiling needs at least one grid pinpoint")
        for canvas in self.pinpoints:
            if canvas.height % self.side or canvas.width % self.side:
                raise ConfigurationError(
                    f"the grid pinpoint {canvas.height} x {canvas.width} is not made of whole sub-images "
                    f"of {self.side} px"
                )

    @property
    def patches_per_side(self) -> int:
        return self.side // self.patch_size

    def grid(self, original: Size) -> Grid:
        """The grid of sub-images that a picture of this size is cut into."""
        canvas = best_canvas(original, self.pinpoints)
        return Grid(canvas.height // self.side, canvas.width // self.side)


def best_canvas(original: Size, pinpoints: Iterable[Size]) -> Size:
    """The canvas that keeps most of the picture's own pixels and, among equals, is the smallest.

    The first of several such wins. Equals transformers' ``select_best_resolution``.
    """

    def preference(canvas: Size) -> tuple[int, int]:
        scale = min(canvas.width / original.width, canvas.height / original.height)
        fitted = int(original.width * scale) * int(original.height * scale)
        effective = min(fitted, original.width * original.height)
        return effective, -canvas.width * canvas.height

    return max(pinpoints, key=preference)


def fit(original: Size, canvas: Size) -> Box:
    """The picture's box on the canvas, in canvas pixels: aspect kept, centred, never empty.

    Equals the resize and pad of transformers' image processor; an odd pixel of padding goes below or right.
    """
    scale_height, scale_width = canvas.height / original.height, canvas.width / original.width
    if scale_width < scale_height:
        height, width = min(math.ceil(original.height * scale_width), canvas.height), canvas.width
    else:
        height, width = canvas.height, min(math.ceil(original.width * scale_height), canvas.width)
    top, left = (canvas.height - height) // 2, (canvas.width - width) // 2
    return Box(top, left, top + height, left + width)


def unpadded(original: Size, grid: Grid, patches_per_side: int) -> Box:
    """The rows and columns of the canvas, in patches, that are real tokens; the rest is padding.

    Equals transformers' ``unpad_image`` on a feature map, but for pictures so thin (beyond 48 : 1 on a canvas
    48 patches wide) that it leaves no row or column at all: here the middle one stays, or the middle two of
    an even number, so that every picture has sub-image tokens.
    """
    rows, cols = grid.rows * patches_per_side, grid.cols * patches_per_side
    top = left = 0
    if original.width / original.height > cols / rows:
        top = _padding(rows, original.height * (cols / original.width))
    else:
        left = _padding(cols, original.width * (rows / original.height))
    return Box(top, left, rows - top, cols - left)


def _padding(length: int, content: float) -> int:
    """Patches of padding on each side; seven decimals as in transformers, against noise below an integer."""
    return (length - max(1, int(round(content, 7)))) // 2


def real_patches(original: Size, grid: Grid, patches_per_side: int) -> torch.Tensor:
    """Which patches are real tokens: bool ``[k + 1, patches_per_side**2]``; of the full-image all are."""
    import torch

    p = patches_per_side
    box = unpadded(original, grid, p)
    canvas = torch.zeros(grid.rows * p, grid.cols * p, dtype=torch.bool)
    canvas[box.top : box.bottom, box.left : box.right] = True
    sub_images = canvas.view(grid.rows, p, grid.cols, p).transpose(1, 2).reshape(grid.num_sub_images, p * p)
    return torch.cat([torch.ones(1, p * p, dtype=torch.bool), sub_images])


def num_tokens(original: Size, grid: Grid, patches_per_side: int) -> int:
    """Real visual tokens before dropping: full-image and unpadded sub-images, newlines not counted."""
    return patches_per_side**2 + unpadded(original, grid, patches_per_side).area


def sub_image_overlap(original: Size, grid: Grid, patches_per_side: int, side: int) -> torch.Tensor:
    """T_pi of Eq. 1: the share of each full-image patch that lies in each sub-image.

    Float32 ``[k, patches_per_side**2]``; every column sums to 1, since the content box lies on the canvas.
    A full-image patch is a rectangle of the picture; fit and pad carry it to the canvas, where the grid's
    lines cut it. Rows and columns are cut independently, so the shares are outer products.
    """
    import torch

    box = fit(original, Size(grid.rows * side, grid.cols * side))
    by_rows = _interval_overlap(box.top, box.bottom, patches_per_side, grid.rows, side)
    by_cols = _interval_overlap(box.left, box.right, patches_per_side, grid.cols, side)
    shares = torch.einsum("ip,jq->ijpq", by_rows, by_cols)
    return shares.reshape(grid.num_sub_images, patches_per_side**2).float()


def _interval_overlap(
    start: int, stop: int, num_patches: int, num_sub_images: int, side: int
) -> torch.Tensor:
    """Share of each of ``num_patches`` equal parts of [start, stop) in each of ``num_sub_images`` cells.

    Float64 ``[num_sub_images, num_patches]``; a cell is ``side`` pixels long.
    """
    import torch

    edges = torch.linspace(start, stop, num_patches + 1, dtype=torch.float64)
    lines = side * torch.arange(num_sub_images + 1, dtype=torch.float64)[:, None]
    shared = torch.minimum(edges[1:], lines[1:]) - torch.maximum(edges[:-1], lines[:-1])
    return shared.clamp(min=0) / (edges[1:] - edges[:-1])
