"""Order, newlines and positions, against transformers' own packing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from hired.errors import ConfigurationError
from hired.geometry import Tiling, num_tokens, real_patches
from hired.packing import NEWLINE, interleaved_position_ids, layout, pack, position_ids
from hired.types import Grid, Size, VisualTokens

SIDE, PATCH_SIZE = 12, 3
P = SIDE // PATCH_SIZE
TILING = Tiling(
    SIDE,
    PATCH_SIZE,
    tuple(Size(SIDE * r, SIDE * c) for r, c in [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3)]),
)
SIZES = [(10, 10), (24, 24), (24, 23), (7, 40), (40, 7), (13, 29), (300, 100), (100, 300), (3, 30), (30, 3)]
NEWLINE_VECTOR = torch.full((3,), -1.0)


def visual_tokens(original: Size, grid: Grid, kept: Tensor, all_features: Tensor) -> VisualTokens:
    """The tokens of ``kept`` bool ``[k + 1, P * P]``; features are those of their partition and patch."""
    partition, patch = kept.nonzero(as_tuple=True)
    return VisualTokens(all_features[kept], partition, patch, grid, original, num_tokens(original, grid, P))


def random_features(grid: Grid) -> Tensor:
    return torch.rand(grid.num_partitions, P * P, 3, generator=torch.Generator().manual_seed(7))


def packed_by_transformers(original: Size, features: Tensor) -> Tensor:
    config = LlavaNextConfig(
        image_grid_pinpoints=[[size.height, size.width] for size in TILING.pinpoints],
        vision_config={"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH_SIZE},
    )
    packed: list[Tensor]
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        torch.tensor([[original.height, original.width]]),
        vision_feature_select_strategy="default",
        image_newline=NEWLINE_VECTOR,
    )
    return packed[0]


# Beyond these aspects transformers leaves no row of the canvas at all, see `hired.geometry.unpadded`.
sizes = st.builds(Size, st.integers(1, 60), st.integers(1, 60)).filter(
    lambda size: max(size.height, size.width) <= 4 * min(size.height, size.width)
)


@st.composite
def dropped(draw: st.DrawFn) -> tuple[VisualTokens, Tensor]:
    """An image's tokens after dropping any of them, and all its features."""
    original = draw(sizes)
    grid = TILING.grid(original)
    features = random_features(grid)
    real = real_patches(original, grid, P)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    kept = real & (torch.rand(real.shape, generator=generator) < draw(st.floats(0, 1)))
    kept[0, draw(st.integers(0, P * P - 1))] = True  # an image keeps at least one token
    return visual_tokens(original, grid, kept, features), features


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_keeping_all_tokens_packs_as_transformers_does(height: int, width: int) -> None:
    original = Size(height, width)
    grid = TILING.grid(original)
    features = random_features(grid)
    tokens = visual_tokens(original, grid, real_patches(original, grid, P), features)
    places = layout(tokens, P)

    torch.testing.assert_close(
        pack(places, tokens.features, NEWLINE_VECTOR),
        packed_by_transformers(original, features),
        rtol=0,
        atol=0,
    )
    assert places.slots.tolist() == list(range(places.num_full))


@given(dropped())
@settings(max_examples=50)
def test_a_kept_token_is_found_at_its_slot_of_the_full_sequence(case: tuple[VisualTokens, Tensor]) -> None:
    tokens, features = case
    places = layout(tokens, P)
    full = packed_by_transformers(tokens.original_size, features)

    assert places.num_full == len(full)
    torch.testing.assert_close(
        pack(places, tokens.features, NEWLINE_VECTOR), full[places.slots], rtol=0, atol=0
    )
    assert bool((places.slots.diff() > 0).all())


@given(dropped())
@settings(max_examples=50)
def test_newlines_close_the_rows_that_keep_a_token_or_all_rows_or_none(
    case: tuple[VisualTokens, Tensor],
) -> None:
    tokens, _ = case
    some, every, no = (layout(tokens, P, newlines=mode) for mode in ("rows", "all", "none"))

    for places in (some, every, no):
        kept = places.source[places.source != NEWLINE]
        assert sorted(kept.tolist()) == list(range(len(tokens)))
    assert len(no) == len(tokens)
    assert len(every) - len(tokens) == _num_rows(tokens)
    # A newline never opens the canvas and never follows another one: its own row keeps a token.
    newline = some.source == NEWLINE
    on_canvas = some.slots >= P * P
    assert not bool((newline[1:] & newline[:-1]).any())
    assert bool(newline[-1]) == bool(on_canvas.any())


def _num_rows(tokens: VisualTokens) -> int:
    real = real_patches(tokens.original_size, tokens.grid, P)[1:]
    rows = real.view(tokens.grid.rows, tokens.grid.cols, P, P).any(dim=1).any(dim=-1)
    return int(rows.sum())


@given(dropped(), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=50)
def test_original_positions_leave_gaps_and_compact_positions_none(
    case: tuple[VisualTokens, Tensor], num_prefix: int, num_suffix: int
) -> None:
    places = layout(case[0], P)
    original = position_ids(num_prefix, places, num_suffix, "original").tolist()
    compact = position_ids(num_prefix, places, num_suffix, "compact").tolist()

    full = list(range(num_prefix + places.num_full + num_suffix))
    assert original[:num_prefix] == full[:num_prefix]
    assert original[num_prefix + len(places) :] == full[num_prefix + places.num_full :]
    assert original[num_prefix : num_prefix + len(places)] == [
        num_prefix + slot for slot in places.slots.tolist()
    ]
    assert compact == list(range(len(original)))


@given(dropped(), dropped(), st.lists(st.integers(0, 5), min_size=3, max_size=3))
@settings(max_examples=25)
def test_several_images_take_the_positions_of_all_their_tokens(
    one: tuple[VisualTokens, Tensor], other: tuple[VisualTokens, Tensor], num_text: list[int]
) -> None:
    places = [layout(one[0], P), layout(other[0], P)]
    before, between, after = num_text
    ids = interleaved_position_ids(num_text, places, "original").tolist()
    start = before + places[0].num_full + between
    assert ids == [
        *position_ids(before, places[0], between, "original").tolist(),
        *(start + slot for slot in places[1].slots.tolist()),
        *range(start + places[1].num_full, start + places[1].num_full + after),
    ]
    compact = interleaved_position_ids(num_text, places, "compact").tolist()
    assert compact == list(range(len(ids)))


def test_positions_coincide_when_every_token_is_kept() -> None:
    original = Size(24, 40)
    grid = TILING.grid(original)
    places = layout(visual_tokens(original, grid, real_patches(original, grid, P), random_features(grid)), P)

    assert torch.equal(position_ids(3, places, 4, "original"), position_ids(3, places, 4, "compact"))


def test_tokens_of_another_tiling_are_refused() -> None:
    original = Size(24, 40)
    grid = TILING.grid(original)
    tokens = visual_tokens(original, grid, real_patches(original, grid, P), random_features(grid))

    with pytest.raises(ConfigurationError, match="same checkpoint"):
        layout(tokens, P + 1)
