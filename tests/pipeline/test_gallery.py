"""Kept patches have their colours, dropped ones do not, and padding is not shown."""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hired.types import Box, Grid, Partitions, Size
from pipeline.gallery import LONGEST_SIDE, Drawing, GallerySample, draw

SIDE, PATCHES = 96, 4
RED = (220, 30, 30)


def sample(kept: NDArray[np.bool_], *, grid: Grid, content: Box, size: Size) -> GallerySample:
    pixels = np.full((grid.num_partitions, SIDE, SIDE, 3), RED, np.uint8)
    return GallerySample("k", "?", "a caption", Partitions(pixels, grid, content, size), kept)


def square(kept: NDArray[np.bool_]) -> GallerySample:
    grid = Grid(2, 2)
    return sample(kept, grid=grid, content=Box(0, 0, 2 * SIDE, 2 * SIDE), size=Size(600, 600))


def none(partitions: int = 5) -> NDArray[np.bool_]:
    return np.zeros((partitions, PATCHES**2), dtype=bool)


def picture(drawing: Drawing) -> NDArray[np.int64]:
    head, _, data = drawing.uri.partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert image.size == (drawing.width, drawing.height)
    return np.asarray(image).astype(np.int64)


def is_red(pixel: NDArray[np.int64]) -> bool:
    return bool(np.abs(pixel - RED).max() < 40)


def test_the_kept_patch_of_the_full_image_has_its_colours_and_no_other() -> None:
    kept = none()
    kept[0, 1 * PATCHES + 2] = True  # second row, third column
    full, sub_images = draw(square(kept))
    pixels, step = picture(full), LONGEST_SIDE // PATCHES
    found = [
        (row, col)
        for row in range(PATCHES)
        for col in range(PATCHES)
        if is_red(pixels[step * row + step // 2, step * col + step // 2])
    ]
    assert found == [(1, 2)]
    assert (full.kept, full.tokens) == (1, 16)
    assert (sub_images.kept, sub_images.tokens) == (0, 64)


def test_sub_images_lie_in_raster_order() -> None:
    kept = none()
    kept[3] = True  # third sub-image: lower left
    pixels = picture(draw(square(kept))[1])
    quarter = LONGEST_SIDE // 4
    middles = [(quarter, quarter), (quarter, 3 * quarter), (3 * quarter, quarter), (3 * quarter, 3 * quarter)]
    assert [is_red(pixels[middle]) for middle in middles] == [False, False, True, False]


def test_lines_mark_where_sub_images_meet() -> None:
    pixels = picture(draw(square(~none()))[1])
    middle = LONGEST_SIDE // 2
    for across in (pixels[middle - 2 : middle + 2, 30], pixels[30, middle - 2 : middle + 2]):
        assert across.min(axis=-1).max() > 150
    assert pixels[30, 30].min() < 60


def test_both_drawings_have_the_pictures_aspect_and_no_padding() -> None:
    content = Box(24, 0, 72, 192)  # 48 of 96 rows are picture
    wide = sample(~none(3), grid=Grid(1, 2), content=content, size=Size(100, 400))
    full, sub_images = draw(wide)
    for drawing in (full, sub_images):
        assert (drawing.width, drawing.height) == (LONGEST_SIDE, LONGEST_SIDE // 4)
        assert is_red(picture(drawing)[5, 5])
    assert (full.tokens, sub_images.tokens) == (16, 16)
    assert sub_images.kept == 16  # padding is no token, whatever the mask says of it


def test_noise_is_compressed_until_it_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, SIDE * 4, SIDE * 4, 3), np.uint8)
    box = Box(0, 0, 8 * SIDE, 8 * SIDE)
    partitions = Partitions(noise, Grid(2, 2), box, Size(900, 900))
    drawings = draw(GallerySample("k", "?", "", partitions, ~none()))
    assert sum(len(drawing.uri) for drawing in drawings) < 150_000


def test_an_edge_that_no_patch_covers_is_dimmed() -> None:
    pixels = np.full((2, 50, 50, 3), RED, np.uint8)  # three patches of 16 leave two pixels
    partitions = Partitions(pixels, Grid(1, 1), Box(0, 0, 50, 50), Size(500, 500))
    drawn = picture(draw(GallerySample("k", "?", "", partitions, np.ones((2, 9), dtype=bool)))[0])
    assert is_red(drawn[200, 200])
    assert not is_red(drawn[200, -3])


@pytest.mark.parametrize("shape", [(4, 16), (5, 15)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"kept must be bool \[5, \d+\] for k"):
        square(np.zeros(shape, dtype=bool))


def test_more_is_dimmed_the_less_is_kept() -> None:
    rng = np.random.default_rng(1)
    reds = []
    for share in (0.1, 0.5, 0.9):
        kept = rng.random((5, PATCHES**2)) < share
        reds.append(
            np.mean([is_red(pixel) for pixel in picture(draw(square(kept))[0])[::8, ::8].reshape(-1, 3)])
        )
    assert all(one < other for one, other in pairwise(reds))
