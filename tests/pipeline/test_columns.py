"""Rows survive the way through Ray's Arrow blocks: equal values, equal failures, equal types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.data import DataContext
from ray.data._internal.delegating_block_builder import DelegatingBlockBuilder
from ray.data.block import BlockAccessor

from hired.errors import ImageTooLargeError, UnreadableImageError
from hired.types import Box, Caption, Grid, Partitions, Size, VisualTokens
from pipeline import columns
from pipeline.columns import Batch, Failure

SIDE = 4

failures = st.builds(
    Failure, st.sampled_from(["read", "partition"]), st.just("OSError"), st.text(max_size=9), st.booleans()
)
grids = st.builds(Grid, st.integers(1, 3), st.integers(1, 3))
sizes = st.builds(Size, st.integers(1, 9000), st.integers(1, 9000))
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def partitions(draw: st.DrawFn) -> Partitions:
    grid = draw(grids)
    bottom, right = draw(st.integers(1, grid.rows * SIDE)), draw(st.integers(1, grid.cols * SIDE))
    pixels = draw(seeds).integers(0, 256, (grid.num_partitions, SIDE, SIDE, 3), np.uint8)
    return Partitions(pixels, grid, Box(0, 0, bottom, right), draw(sizes))


@st.composite
def tokens(draw: st.DrawFn, dtype: torch.dtype) -> VisualTokens:
    num, grid = draw(st.integers(1, 20)), draw(grids)
    return VisualTokens(
        features=torch.from_numpy(draw(seeds).normal(size=(num, 6))).to(dtype),
        partition=torch.arange(num) % grid.num_partitions,
        patch=torch.arange(num),
        grid=grid,
        original_size=draw(sizes),
        num_before=num + draw(st.integers(0, 9)),
    )


@pytest.fixture(autouse=True)
def _never_pickle() -> None:
    """Ray must fail rather than fall back on pickled objects, as the pipeline asks of it."""
    DataContext.get_current().enable_fallback_to_arrow_object_ext_type = False


def through_arrow(*batches: Batch) -> Batch:
    """What a stage receives when these batches, returned by another, meet in one block."""
    builder = DelegatingBlockBuilder()
    for batch in batches:
        builder.add_batch(batch)
    received: Batch = BlockAccessor.for_block(builder.build()).to_batch_format("numpy")
    return received


@given(st.lists(st.binary(max_size=50) | failures, min_size=1, max_size=5))
def test_images_and_failures_come_out_as_they_went_in(rows: list[bytes | Failure]) -> None:
    assert columns.to_images(through_arrow(columns.of_images(rows))) == rows


@given(
    st.lists(partitions() | failures, min_size=1, max_size=4),
    st.lists(partitions() | failures, min_size=1, max_size=4),
)
def test_partitions_of_any_mix_of_grids_come_out_as_they_went_in(
    first: list[Partitions | Failure], second: list[Partitions | Failure]
) -> None:
    batch = through_arrow(columns.of_partitions(first), columns.of_partitions(second))
    for sent, received in zip(first + second, columns.to_partitions(batch), strict=True):
        if isinstance(sent, Failure):
            assert received == sent
        else:
            assert isinstance(received, Partitions)
            np.testing.assert_array_equal(received.pixels, sent.pixels)
            assert received.pixels.dtype == np.uint8
            assert (received.grid, received.content) == (sent.grid, sent.content)
            assert received.original_size == sent.original_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@given(data=st.data())
def test_visual_tokens_come_out_as_they_went_in(dtype: torch.dtype, data: st.DataObject) -> None:
    first, second = (data.draw(st.lists(tokens(dtype) | failures, min_size=1, max_size=4)) for _ in range(2))
    batch = through_arrow(columns.of_tokens(first, dtype), columns.of_tokens(second, dtype))
    for sent, received in zip(first + second, columns.to_tokens(batch), strict=True):
        if isinstance(sent, Failure):
            assert received == sent
        else:
            assert isinstance(received, VisualTokens)
            for name in ("features", "partition", "patch"):
                torch.testing.assert_close(getattr(received, name), getattr(sent, name), rtol=0, atol=0)
            assert (received.grid, received.original_size) == (sent.grid, sent.original_size)
            assert received.num_before == sent.num_before


def test_batches_of_failures_alone_have_the_types_of_other_batches() -> None:
    failure = Failure("read", "OSError", "gone", True)
    token = VisualTokens(
        torch.ones(2, 6, dtype=torch.float16),
        torch.zeros(2).long(),
        torch.arange(2),
        Grid(1, 1),
        Size(3, 3),
        5,
    )
    for of, value in (
        (lambda rows: columns.of_tokens(rows, torch.float16), token),
        (columns.of_captions, Caption("a", (1,), "stop", 9, 8, 4)),
        (columns.of_images, b"image"),
    ):
        mixed, failed = of([value, failure]), of([failure, failure])
        assert {name: column.dtype for name, column in mixed.items()} == {
            name: column.dtype for name, column in failed.items()
        }
        together = through_arrow(mixed, failed)
        assert columns.failures(together) == [None, failure, failure, failure]


def test_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        columns.of_tokens([Failure("read", "OSError", "", False)], torch.bfloat16)


def test_failures_say_whether_another_attempt_may_help() -> None:
    assert not Failure.of(UnreadableImageError("broken"), "partition").retryable
    assert not Failure.of(ImageTooLargeError("huge"), "partition").retryable
    assert not Failure.of(FileNotFoundError(2, "No such file"), "read").retryable
    assert not Failure.of(PermissionError(13, "no"), "read").retryable
    assert Failure.of(OSError(5, "Input/output error"), "read").retryable
    assert Failure.of(TimeoutError("slow"), "read").retryable
    assert Failure.of(MemoryError(), "encode").retryable
    assert Failure.of(torch.OutOfMemoryError("CUDA out of memory"), "encode").retryable


def test_error_messages_fit_into_arrow_strings() -> None:
    failure = Failure.of(ValueError("\udcff" * 400), "read")
    assert len(failure.error) == columns.MAX_ERROR_CHARACTERS
    assert failure.error.startswith("\\udcff")
    assert columns.failures(through_arrow(columns.of_images([failure]))) == [failure]
