"""The values that flow through everything: ``Partitions`` -> ``VisualTokens`` -> ``Caption``.

All are frozen and checked when made; whatever can be derived is a property.
Heights come before widths and rows before columns, as in arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a size needs positive sides, got {self.height} x {self.width}")


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of sub-images on the canvas."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a grid needs positive sides, got {self.rows} x {self.cols}")

    @property
    def num_sub_images(self) -> int:
        return self.rows * self.cols

    @property
    def num_partitions(self) -> int:
        """The sub-images and the full-image."""
        return self.rows * self.cols + 1


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open rectangle, ``top <= row < bottom`` and ``left <= column < right``."""

    top: int
    left: int
    bottom: int
    right: int

    def __post_init__(self) -> None:
        if not (0 <= self.top < self.bottom and 0 <= self.left < self.right):
            raise ValueError(f"not a box with content: {self}")

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, slots=True, eq=False)
class Partitions:
    """One image cut up: ``pixels[0]`` is the full-image, ``pixels[1:]`` the sub-images in raster order.

    ``pixels`` is uint8 ``[k + 1, side, side, 3]`` in RGB; ``content`` is the picture's box on the padded
    canvas, in canvas pixels; ``original_size`` is the upright picture's size before fitting.
    """

    pixels: NDArray[np.uint8]
    grid: Grid
    content: Box
    original_size: Size

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise ValueError(f"pixels must be uint8 [k + 1, side, side, 3], got {self.pixels.dtype} {shape}")
        if shape[0] != self.grid.num_partitions:
            raise ValueError(f"a {self.grid} needs {self.grid.num_partitions} partitions, got {shape[0]}")
        if self.content.bottom > self.canvas.height or self.content.right > self.canvas.width:
            raise ValueError(f"{self.content} does not lie on the canvas {self.canvas}")

    @property
    def side(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def canvas(self) -> Size:
        return Size(self.grid.rows * self.side, self.grid.cols * self.side)


@dataclass(frozen=True, slots=True, eq=False)
class VisualTokens:
    """The visual tokens of one image that survive dropping, before the projector.

    ``features`` is ``[n, d]``; ``partition`` ``[n]`` names each token's partition (0 = full-image, then the
    sub-images in raster order) and ``patch`` ``[n]`` its raster index inside that partition, both int64.
    Tokens are sorted by (partition, patch) and unique. ``num_before`` counts the image's tokens before
    dropping, padding left out. ``original_size`` is what laying tokens back on the canvas needs.
    """

    features: torch.Tensor
    partition: torch.Tensor
    patch: torch.Tensor
    grid: Grid
    original_size: Size
    num_before: int

    def __post_init__(self) -> None:
        n = self.features.shape[0]
        if self.features.ndim != 2 or self.partition.shape != (n,) or self.patch.shape != (n,):
            raise ValueError(
                f"features [n, d], partition [n] and patch [n] disagree: "
                f"{tuple(self.features.shape)}, {tuple(self.partition.shape)}, {tuple(self.patch.shape)}"
            )
        if not 0 < n <= self.num_before:
            raise ValueError(f"{n} tokens cannot remain of {self.num_before}")

    def __len__(self) -> int:
        return int(self.features.shape[0])


@dataclass(frozen=True, slots=True)
class Caption:
    """One answer: its text, its token ids, why it ended, and what it cost.

    ``prompt_tokens`` counts everything the language model was prefilled with, visual tokens included.
    ``visual_tokens_full`` and ``visual_tokens_kept`` count the visual tokens, newlines included, that a
    keep-all run would have sent and that this run did send.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    visual_tokens_full: int
    visual_tokens_kept: int

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)
