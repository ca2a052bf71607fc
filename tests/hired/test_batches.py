"""How images are gathered into batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hired.batches import Batch, batches, few_sizes, filled_up
from hired.errors import ConfigurationError
from hired.geometry import Tiling
from hired.types import Box, Grid, Partitions, Size

SIDE = 8
TILING = Tiling(SIDE, 4, tuple(Size(r * SIDE, c * SIDE) for r, c in [(1, 1), (1, 2), (2, 2), (3, 3)]))

grids = st.sampled_from([Grid(1, 1), Grid(1, 2), Grid(2, 2), Grid(3, 3)])
sizes = st.sets(st.integers(1, 64), max_size=8)


def image(grid: Grid, number: int = 0) -> Partitions:
    """A picture that fills its canvas, all pixels ``number``."""
    canvas = Size(grid.rows * SIDE, grid.cols * SIDE)
    pixels = np.full((grid.num_partitions, SIDE, SIDE, 3), number, np.uint8)
    return Partitions(pixels, grid, Box(0, 0, canvas.height, canvas.width), canvas)


@given(st.lists(grids, max_size=12), st.integers(1, 40), sizes)
def test_every_image_comes_once_in_order_and_the_bound_holds(
    grids: list[Grid], max_partitions: int, sizes: Collection[int]
) -> None:
    images = [image(grid, number) for number, grid in enumerate(grids)]
    cut = list(batches(images, TILING, max_partitions, sizes))
    assert [picture for batch in cut for picture in batch.images] == images
    for batch in cut:
        num_partitions = sum(batch.num_partitions)
        assert num_partitions <= max_partitions or len(batch.images) == 1
        assert len(batch.pixels) == filled_up(num_partitions, sizes)
    for batch, following in pairwise(cut):  # no batch is smaller than it must be
        assert sum(batch.num_partitions) + following.num_partitions[0] > max_partitions


@given(st.lists(grids, min_size=1, max_size=6), st.integers(0, 3))
def test_rows_lead_to_an_images_own_partitions(grids: list[Grid], num_blank: int) -> None:
    images = [image(grid, 1 + number) for number, grid in enumerate(grids)]
    batch = Batch.of(images, TILING, sum(grid.num_partitions for grid in grids) + num_blank)
    for number, grid in enumerate(grids):
        own = batch.pixels[batch.row[number, : grid.num_partitions]]
        assert (own == 1 + number).all()
        assert batch.present[number].any(-1).sum() == grid.num_partitions
        assert batch.real_by_image[number].all()
    assert batch.num_before == [4 * grid.num_partitions for grid in grids]
    assert batch.pixels[len(batch.pixels) - num_blank :].eq(0).all()


@given(st.integers(1, 1000), sizes)
def test_filling_up_costs_an_eighth_at_most(num_partitions: int, sizes: Collection[int]) -> None:
    size = filled_up(num_partitions, sizes)
    assert num_partitions <= size <= num_partitions * 9 // 8
    assert size == num_partitions or size in sizes


@given(st.integers(1, 1000))
def test_sizes_are_few_and_end_at_the_largest(max_partitions: int) -> None:
    sizes = few_sizes(max_partitions)
    assert 1 <= len(sizes) <= 8
    assert sizes[0] > 0
    assert sizes[-1] == max_partitions
    assert sorted(set(sizes)) == list(sizes)


def test_a_full_batch_of_llava_next_is_filled_up_and_a_single_image_is_not() -> None:
    assert filled_up(30, few_sizes(32)) == 32
    assert filled_up(5, few_sizes(32)) == 5


def test_a_mapped_batch_maps_every_tensor() -> None:
    batch = Batch.of([image(Grid(1, 2), 3), image(Grid(2, 2), 5)], TILING)
    mapped = batch.map(lambda tensor: tensor.clone())
    assert mapped.images == batch.images
    for name in ("pixels", "row", "present", "real", "overlap"):
        before, after = getattr(batch, name), getattr(mapped, name)
        assert after is not before
        assert torch.equal(after, before)


def test_partitions_of_another_side_are_refused() -> None:
    other = replace(TILING, side=16, pinpoints=(Size(16, 16),))
    with pytest.raises(ConfigurationError, match="8 px do not fit a tower for 16 px"):
        list(batches([image(Grid(1, 1))], other, 4))
