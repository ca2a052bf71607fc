"""Geometry against transformers' own LLaVA-NeXT functions, and against counting pixels one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from hired.errors import ConfigurationError
from hired.geometry import (
    Tiling,
    best_canvas,
    fit,
    num_tokens,
    real_patches,
    sub_image_overlap,
    unpadded,
)
from hired.types import Box, Grid, Size

many = settings(max_examples=300)

LLAVA_NEXT = Tiling(
    side=336,
    patch_size=14,
    pinpoints=tuple(Size(*p) for p in [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]),
)

lengths = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 100_000))
sizes = st.builds(Size, lengths, lengths)
grids = st.builds(Grid, st.integers(1, 6), st.integers(1, 6))


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    side, patch_size = draw(st.sampled_from([(336, 14), (192, 16), (224, 32), (30, 7), (8, 4), (4, 4)]))
    drawn = draw(st.lists(grids, min_size=1, max_size=8))
    return Tiling(side, patch_size, tuple(Size(grid.rows * side, grid.cols * side) for grid in drawn))


def as_lists(pinpoints: tuple[Size, ...]) -> list[list[int]]:
    return [[size.height, size.width] for size in pinpoints]


def overlap_by_counting(original: Size, grid: Grid, patches: int, side: int) -> NDArray[np.float64]:
    """T_pi the slow way: every canvas pixel, cut ``patches`` times each way, votes for its sub-image.

    Exact, because no patch edge and no grid line falls inside such a piece.
    """
    box = fit(original, Size(grid.rows * side, grid.cols * side))
    votes: NDArray[np.float64] = np.zeros((grid.num_sub_images, patches * patches))
    for y in range(box.height * patches):
        for x in range(box.width * patches):
            row, col = (
                (box.top * patches + y) // (side * patches),
                (box.left * patches + x) // (side * patches),
            )
            patch = (y // box.height) * patches + x // box.width
            votes[row * grid.cols + col, patch] += 1
    votes /= votes.sum(axis=0)
    return votes


@many
@given(sizes, tilings())
def test_the_best_canvas_is_the_one_transformers_selects(original: Size, tiling: Tiling) -> None:
    expected = select_best_resolution((original.height, original.width), as_lists(tiling.pinpoints))
    assert best_canvas(original, tiling.pinpoints) == Size(*expected)


@many
@given(sizes, tilings())
def test_the_grid_and_the_number_of_partitions_are_those_of_transformers(
    original: Size, tiling: Tiling
) -> None:
    size, pinpoints = (original.height, original.width), as_lists(tiling.pinpoints)
    grid = tiling.grid(original)
    assert (grid.rows, grid.cols) == get_anyres_image_grid_shape(size, pinpoints, tiling.side)
    assert grid.num_partitions == image_size_to_num_patches(size, pinpoints, tiling.side)


@many
@given(sizes, tilings())
def test_the_content_box_has_the_size_that_transformers_resizes_to(original: Size, tiling: Tiling) -> None:
    canvas = best_canvas(original, tiling.pinpoints)
    box = fit(original, canvas)
    picture = np.broadcast_to(np.uint8(0), (3, original.height, original.width))
    expected = get_patch_output_size(picture, (canvas.height, canvas.width), "channels_first")
    assert (box.height, box.width) == expected


@many
@given(sizes, tilings())
def test_the_content_touches_two_edges_of_the_canvas_and_is_centred(original: Size, tiling: Tiling) -> None:
    canvas = best_canvas(original, tiling.pinpoints)
    box = fit(original, canvas)
    assert box.height == canvas.height or box.width == canvas.width
    assert canvas.height - box.bottom - box.top in (0, 1)
    assert canvas.width - box.right - box.left in (0, 1)


@many
@given(sizes, grids, st.integers(1, 24))
@example(Size(1, 1), Grid(1, 1), 1)
@example(Size(55, 176), Grid(2, 2), 24)  # 14.999999999999998 rows of content
def test_the_unpadded_tokens_are_those_that_transformers_keeps(
    original: Size, grid: Grid, patches: int
) -> None:
    rows, cols = grid.rows * patches, grid.cols * patches
    indices = torch.arange(rows * cols).view(1, rows, cols)
    expected = unpad_image(indices, (original.height, original.width))
    assume(expected.numel())
    box = unpadded(original, grid, patches)
    assert torch.equal(indices[:, box.top : box.bottom, box.left : box.right], expected)


@many
@given(sizes, grids, st.integers(1, 24))
def test_a_picture_too_thin_for_transformers_keeps_the_middle_of_the_canvas(
    original: Size, grid: Grid, patches: int
) -> None:
    box = unpadded(original, grid, patches)
    rows, cols = grid.rows * patches, grid.cols * patches
    assert box.top == rows - box.bottom
    assert box.left == cols - box.right
    assert box.height == rows or box.width == cols


@pytest.mark.parametrize(
    ("original", "grid", "expected"),
    [
        (Size(10, 1000), Grid(1, 3), Box(11, 0, 13, 72)),
        (Size(1000, 10), Grid(3, 1), Box(0, 11, 72, 13)),
        (Size(1, 50_000), Grid(2, 2), Box(23, 0, 25, 48)),
    ],
)
def test_a_strip_of_100_to_1_keeps_two_rows_where_transformers_keeps_none(
    original: Size, grid: Grid, expected: Box
) -> None:
    canvas = torch.zeros(1, grid.rows * 24, grid.cols * 24)
    assert unpad_image(canvas, (original.height, original.width)).numel() == 0
    assert unpadded(original, grid, 24) == expected


@many
@given(sizes, grids, st.integers(1, 8))
def test_real_patches_laid_back_on_the_canvas_fill_the_unpadded_box_and_nothing_else(
    original: Size, grid: Grid, patches: int
) -> None:
    real = real_patches(original, grid, patches)
    assert real.shape == (grid.num_partitions, patches**2)
    assert real.dtype == torch.bool
    assert real[0].all()
    box = unpadded(original, grid, patches)
    for i, sub_image in enumerate(real[1:]):
        for j, is_real in enumerate(sub_image.tolist()):
            row = (i // grid.cols) * patches + j // patches
            col = (i % grid.cols) * patches + j % patches
            assert is_real == (box.top <= row < box.bottom and box.left <= col < box.right)


@many
@given(sizes, grids, st.integers(1, 24))
def test_the_number_of_tokens_is_the_number_of_real_patches(original: Size, grid: Grid, patches: int) -> None:
    assert num_tokens(original, grid, patches) == real_patches(original, grid, patches).sum()


@many
@given(sizes, grids, st.sampled_from([(1, 1), (2, 7), (4, 8), (5, 8), (24, 336), (12, 192)]))
def test_every_full_image_patch_is_shared_out_whole(original: Size, grid: Grid, cut: tuple[int, int]) -> None:
    overlap = sub_image_overlap(original, grid, *cut)
    assert overlap.shape == (grid.num_sub_images, cut[0] ** 2)
    assert overlap.dtype == torch.float32
    assert overlap.min() >= 0
    torch.testing.assert_close(overlap.sum(0), torch.ones(cut[0] ** 2), rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(sizes, st.builds(Grid, st.integers(1, 3), st.integers(1, 3)), st.integers(1, 4), st.integers(1, 7))
def test_overlaps_equal_counting_pixels(original: Size, grid: Grid, patches: int, side: int) -> None:
    expected = overlap_by_counting(original, grid, patches, side)
    actual = sub_image_overlap(original, grid, patches, side).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_quadrants_of_a_square_picture_are_the_four_sub_images() -> None:
    overlap = sub_image_overlap(Size(500, 500), Grid(2, 2), 4, 336).view(2, 2, 4, 4)
    for row in range(2):
        for col in range(2):
            expected = torch.zeros(4, 4)
            expected[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = 1
            assert torch.equal(overlap[row, col], expected)


def test_an_odd_number_of_patches_splits_the_middle_ones_between_sub_images() -> None:
    overlap = sub_image_overlap(Size(500, 500), Grid(1, 2), 3, 336).view(2, 3, 3)
    assert torch.equal(overlap[0], torch.tensor([[1.0, 0.5, 0.0]] * 3))
    assert torch.equal(overlap[1], torch.tensor([[0.0, 0.5, 1.0]] * 3))


@pytest.mark.parametrize(
    ("side", "patch_size", "pinpoints", "words"),
    [
        (336, 14, (), "at least one grid pinpoint"),
        (336, 14, (Size(672, 500),), "672 x 500 is not made of whole sub-images of 336 px"),
        (336, 400, (Size(672, 672),), "400 px do not fit"),
        (336, 0, (Size(672, 672),), "0 px do not fit"),
    ],
)
def test_a_tiling_that_cannot_be_is_a_configuration_error(
    side: int, patch_size: int, pinpoints: tuple[Size, ...], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Tiling(side, patch_size, pinpoints)


def test_llava_next_has_24_patches_a_side_and_2880_tokens_at_most() -> None:
    assert LLAVA_NEXT.patches_per_side == 24
    assert num_tokens(Size(1000, 1000), LLAVA_NEXT.grid(Size(1000, 1000)), 24) == 2880
