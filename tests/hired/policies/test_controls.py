"""random, grid, pool and thumbnail: the controls, against a reading place by place."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hired.budget import Budget
from hired.policies.grid import EvenGrid
from hired.policies.pool import Pool
from hired.policies.random import Random
from hired.policies.spacing import cell_centres, evenly_spaced
from hired.policies.thumbnail import Thumbnail
from hired.types import Grid, Size
from tests.candidates import (
    EXAMPLES,
    Picture,
    candidates,
    kept,
    naive_even_shares,
    patches_of,
    pictures,
    real_of,
)

BUDGETS = [Budget(rate=0.05), Budget(rate=0.2), Budget(rate=0.4), Budget(rate=0.75), Budget(tokens=3)]

SQUARE = Picture(Size(64, 64), Grid(2, 2), seed=5, per_side=6)


class TestEvenlySpaced:
    @given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 40))
    def test_it_equals_counting_along_the_row(self, among: list[bool], count: int) -> None:
        places = [place for place, there in enumerate(among) if there]
        count = min(count, len(places))
        expected = [places[math.ceil(number * len(places) / count)] for number in range(count)]
        keep = evenly_spaced(torch.tensor(among), torch.tensor(count))
        assert keep.nonzero()[:, 0].tolist() == expected


class TestGrid:
    def test_a_third_is_the_first_and_every_third_patch_of_each_partition(self) -> None:
        every_third = list(range(0, 36, 3))
        assert patches_of(EvenGrid(), SQUARE, Budget(rate=1 / 3)) == [every_third] * 5

    @pytest.mark.parametrize("picture", EXAMPLES)
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        shares = naive_even_shares(picture, budget.num_tokens(int(picture.real.sum())))
        expected = [
            [patches[math.ceil(number * len(patches) / share)] for number in range(share)]
            for patches, share in zip(real_of(picture), shares, strict=True)
        ]
        assert patches_of(EvenGrid(), picture, budget) == expected


class TestRandom:
    def test_seed_and_picture_decide(self) -> None:
        one, other = SQUARE, Picture(SQUARE.original, SQUARE.grid, seed=6, per_side=6)
        budget = Budget(rate=0.3)
        drawn = [
            str(patches_of(Random(seed=seed), picture, budget))
            for seed in (0, 1, 2)
            for picture in (one, other)
        ]
        assert len(set(drawn)) == 6
        assert patches_of(Random(seed=1), one, budget) == patches_of(Random(seed=1), one, budget)

    def test_every_real_patch_is_as_likely_as_any_other(self) -> None:
        policy, budget = Random(), Budget(rate=0.25)
        picture = EXAMPLES[1]
        times = torch.zeros(picture.real.shape)
        for seed in range(400):
            same_picture = Picture(picture.original, picture.grid, seed=seed)
            times += kept(policy, candidates(policy, [same_picture], budget))[0]
        share = times / 400
        assert not share[~picture.real].any()
        assert (share[picture.real] - 0.25).abs().max() < 0.1  # 4.6 standard deviations


def naive_cells(patches: list[int], count: int, per_side: int) -> list[list[int]]:
    """A rectangle's rows cut into bands, each band into cells: each patch where its upper left corner is."""
    rows = sorted({patch // per_side for patch in patches})
    cols = sorted({patch % per_side for patch in patches})
    num_bands = round(math.sqrt(count * len(rows) / len(cols)))
    num_bands = min(max(num_bands, math.ceil(count / len(cols))), len(rows), count)
    edges = [band * count // num_bands for band in range(num_bands + 1)]
    cells: list[list[int]] = [[] for _ in range(count)]
    for patch in patches:
        row, col = rows.index(patch // per_side), cols.index(patch % per_side)
        band = row * num_bands // len(rows)
        num_cells = edges[band + 1] - edges[band]
        cells[edges[band] + col * num_cells // len(cols)].append(patch)
    return cells


def naive_centre(cell: list[int], per_side: int) -> int:
    rows = sorted({patch // per_side for patch in cell})
    cols = sorted({patch % per_side for patch in cell})
    return rows[(len(rows) - 1) // 2] * per_side + cols[(len(cols) - 1) // 2]


class TestCells:
    @given(pictures(per_side=6), st.data())
    def test_there_are_as_many_as_asked_for_and_none_is_empty(
        self, picture: Picture, data: st.DataObject
    ) -> None:
        for real in picture.real:
            if not real.any():
                continue
            count = data.draw(st.integers(1, int(real.sum())))
            centres = cell_centres(real, torch.tensor(count))[real].tolist()
            assert len(set(centres)) == count
            assert real[centres].all()
            cells = naive_cells(real.nonzero()[:, 0].tolist(), count, 6)
            assert all(cells)
            assert Counter(centres) == {naive_centre(cell, 6): len(cell) for cell in cells}


class TestPool:
    def test_a_quarter_is_the_mean_of_two_by_two(self) -> None:
        answer = Pool().select(candidates(Pool(), [SQUARE], Budget(rate=0.25)))
        squares = SQUARE.features.view(5, 3, 2, 3, 2, -1)
        merged = answer.features[0][answer.keep[0]].view(5, 3, 3, -1)
        torch.testing.assert_close(merged, squares.mean((2, 4)))

    @pytest.mark.parametrize("picture", EXAMPLES)
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        shares = naive_even_shares(picture, budget.num_tokens(int(picture.real.sum())))
        answer = Pool().select(candidates(Pool(), [picture], budget))
        for number, (patches, share) in enumerate(zip(real_of(picture), shares, strict=True)):
            expected: dict[int, Tensor] = {}
            for cell in naive_cells(patches, share, picture.per_side) if share else []:
                mean = torch.stack([picture.features[number, patch] for patch in cell]).mean(0)
                expected[naive_centre(cell, picture.per_side)] = mean
            assert answer.keep[0, number].nonzero()[:, 0].tolist() == sorted(expected)
            for patch, mean in expected.items():
                torch.testing.assert_close(answer.features[0, number, patch], mean)


class TestThumbnail:
    def test_all_of_the_full_image_where_the_budget_has_room(self) -> None:
        for budget in (Budget(rate=0.2), Budget(rate=0.4), Budget(rate=1.0)):
            assert patches_of(Thumbnail(), SQUARE, budget) == [list(range(36)), [], [], [], []]

    def test_under_a_smaller_budget_patches_spread_over_it(self) -> None:
        [full_image, *sub_images] = patches_of(Thumbnail(), SQUARE, Budget(tokens=9))
        assert full_image == [row * 6 + col for row in (0, 2, 4) for col in (0, 2, 4)]
        assert not any(sub_images)

    @pytest.mark.parametrize("picture", EXAMPLES)
    @pytest.mark.parametrize("num_tokens", [1, 5, 7, 11, 16])
    def test_it_equals_the_naive_reading(self, picture: Picture, num_tokens: int) -> None:
        cells = naive_cells(real_of(picture)[0], num_tokens, picture.per_side)
        expected = sorted(naive_centre(cell, picture.per_side) for cell in cells)
        assert patches_of(Thumbnail(), picture, Budget(tokens=num_tokens))[0] == expected
