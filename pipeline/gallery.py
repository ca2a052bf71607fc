"""Which tokens were kept, drawn on the picture: dropped patches are dimmed, as in the paper's figures.

The full-image has the picture's own aspect again, and the sub-images lie side by side as they were cut, with
the canvas's padding left out: no token stands for it.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hired.geometry import real_patches
from hired.types import Box, Partitions

LONGEST_SIDE = 448
# Two drawings a sample, a third larger in base64: below 150 KB together.
MAX_BYTES = 55_000
QUALITIES = (80, 65, 50, 35, 20, 5)
# What is dropped keeps a little of its light and none of its colours, on neither black nor white.
DIMMED, TINT = 0.45, np.array([52, 56, 72], np.float32)
LINE = (255, 255, 255)


@dataclass(frozen=True, slots=True, eq=False)
class GallerySample:
    """A captioned image: ``kept`` is bool ``[k + 1, patches of a partition]``, in raster order."""

    key: str
    prompt: str
    caption: str
    partitions: Partitions
    kept: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shape = (self.partitions.grid.num_partitions, self.patches_per_side**2)
        if self.kept.shape != shape:
            raise ValueError(f"kept must be bool {list(shape)} for {self.key}, got {list(self.kept.shape)}")

    @property
    def patches_per_side(self) -> int:
        return math.isqrt(self.kept.shape[1])


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture as a data URI, and how many of its tokens are kept."""

    uri: str
    width: int
    height: int
    kept: int
    tokens: int


def draw(sample: GallerySample) -> tuple[Drawing, Drawing]:
    """The full-image and the sub-images."""
    partitions, patches = sample.partitions, sample.patches_per_side
    real = real_patches(partitions.original_size, partitions.grid, patches).numpy()
    kept = sample.kept & real
    size = partitions.original_size
    full = Image.fromarray(_dimmed(partitions.pixels[0], _grown(kept[0], patches, partitions.side)))
    whole = full.resize(_fitted(size.width, size.height), Image.Resampling.LANCZOS)
    return (
        _drawing(whole, int(kept[0].sum()), int(real[0].sum())),
        _drawing(_canvas(partitions, kept[1:]), int(kept[1:].sum()), int(real[1:].sum())),
    )


def _canvas(partitions: Partitions, kept: NDArray[np.bool_]) -> Image.Image:
    """The content of all sub-images, with lines where they meet."""
    side, patches = partitions.side, math.isqrt(kept.shape[1])
    tiles = [
        _dimmed(pixels, _grown(mask, patches, side))
        for pixels, mask in zip(partitions.pixels[1:], kept, strict=True)
    ]
    rows, cols = partitions.grid.rows, partitions.grid.cols
    canvas = np.stack(tiles).reshape(rows, cols, side, side, 3)
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * side, cols * side, 3)
    box = partitions.content
    content = Image.fromarray(canvas[box.top : box.bottom, box.left : box.right])
    image = content.resize(_fitted(box.width, box.height), Image.Resampling.LANCZOS)
    _draw_lines(image, box, side)
    return image


def _draw_lines(image: Image.Image, box: Box, side: int) -> None:
    pen, scale = ImageDraw.Draw(image), image.width / box.width
    for line in range(side * (box.left // side + 1), box.right, side):
        pen.line([((line - box.left) * scale, 0), ((line - box.left) * scale, image.height)], LINE, 2)
    for line in range(side * (box.top // side + 1), box.bottom, side):
        pen.line([(0, (line - box.top) * scale), (image.width, (line - box.top) * scale)], LINE, 2)


def _grown(mask: NDArray[np.bool_], patches: int, side: int) -> NDArray[np.bool_]:
    """The mask ``[patches**2]`` in pixels, ``[side, side]``; an edge that no patch covers is not kept."""
    grown = np.zeros((side, side), dtype=bool)
    size = side // patches
    square = mask.reshape(patches, patches).repeat(size, axis=0).repeat(size, axis=1)
    grown[: patches * size, : patches * size] = square
    return grown


def _dimmed(pixels: NDArray[np.uint8], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    light = pixels.mean(axis=-1, keepdims=True)
    dimmed = (DIMMED * light + (1 - DIMMED) * TINT).astype(np.uint8)
    return np.where(kept[..., None], pixels, dimmed)


def _fitted(width: int, height: int) -> tuple[int, int]:
    scale = LONGEST_SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _drawing(image: Image.Image, kept: int, tokens: int) -> Drawing:
    data = b""
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality)
        data = file.getvalue()
        if len(data) <= MAX_BYTES:
            break
    uri = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return Drawing(uri, image.width, image.height, kept, tokens)
