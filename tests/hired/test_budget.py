from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hired.budget import Budget, allocate, integer_shares, visual_content_scores
from hired.errors import ConfigurationError


class TestBudget:
    @pytest.mark.parametrize(
        ("budget", "num_before", "num_tokens"),
        [
            (Budget(rate=0.2), 2880, 576),
            (Budget(rate=0.29), 100, 29),  # 0.29 * 100 falls just below 29
            (Budget(rate=0.5), 5, 2),
            (Budget(rate=0.001), 100, 1),
            (Budget(rate=1.0), 1234, 1234),
            (Budget(rate=1), 1234, 1234),
            (Budget(tokens=576), 2880, 576),
            (Budget(tokens=576), 100, 100),
            (Budget(tokens=1), 100, 1),
        ],
    )
    def test_says_how_many_tokens_remain(self, budget: Budget, num_before: int, num_tokens: int) -> None:
        assert budget.num_tokens(num_before) == num_tokens

    @pytest.mark.parametrize(
        ("options", "mend"),
        [
            ({}, "exactly one"),
            ({"rate": 0.2, "tokens": 576}, "exactly one"),
            ({"rate": 0.0}, "at most 1"),
            ({"rate": 1.01}, "at most 1"),
            ({"rate": float("nan")}, "at most 1"),
            ({"rate": "0.2"}, "at most 1"),
            ({"rate": True}, "at most 1"),
            ({"tokens": 0}, "integer"),
            ({"tokens": 57.6}, "integer"),
            ({"tokens": True}, "integer"),
            ({"rate": 0.2, "alpha": -0.1}, "from 0"),
            ({"rate": 0.2, "alpha": 1.1}, "from 0"),
            ({"rate": 0.2, "alpha": None}, "from 0"),
        ],
    )
    def test_out_of_range_is_refused_with_the_mend(self, options: dict[str, Any], mend: str) -> None:
        with pytest.raises(ConfigurationError, match=mend):
            Budget(**options)


caps = st.integers(0, 600)
# Repeated values, so that ties and parts without weight are common.
weights = st.one_of(st.floats(0, 100, width=32), st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1.0, 3.0, 1e30]))


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, list[float], list[int]]:
    """A total, weights and caps; the total at most the sum of the caps."""
    parts = draw(st.lists(st.tuples(weights, caps), min_size=1, max_size=7))
    room = sum(cap for _, cap in parts)
    return draw(st.integers(0, room)), [weight for weight, _ in parts], [cap for _, cap in parts]


def shares(total: int, weights: list[float], caps: list[int]) -> list[int]:
    row = integer_shares(torch.tensor([total]), torch.tensor([weights]).double(), torch.tensor([caps]))
    assert row.dtype == torch.int64
    result: list[int] = row[0].tolist()
    return result


def naive_shares(total: int, weights: list[float], caps: list[int]) -> list[int]:
    """Largest remainder in exact fractions, part by part, in as many rounds as it takes."""
    result = [0] * len(caps)
    parts = [i for i in range(len(caps)) if weights[i] > 0]
    room = sum(caps[i] for i in parts)
    if total > room:
        others = [0 if i in parts else cap for i, cap in enumerate(caps)]
        left_over = naive_shares(total - room, [float(cap) for cap in others], others)
        return [caps[i] if i in parts else left_over[i] for i in range(len(caps))]
    quotas: dict[int, Fraction] = {}
    while parts:
        left = total - sum(result)
        sum_of_weights = sum(Fraction(weights[i]) for i in parts)
        quotas = {i: left * Fraction(weights[i]) / sum_of_weights for i in parts}
        overflowing = [i for i in parts if quotas[i] >= caps[i]]
        if not overflowing:
            break
        for i in overflowing:
            result[i] = caps[i]
            parts.remove(i)
    for i in parts:
        result[i] = quotas[i].__floor__()
    by_remainder = sorted(parts, key=lambda i: (-(quotas[i] % 1), -weights[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


class TestIntegerShares:
    @given(divisions())
    def test_the_total_is_used_exactly_and_no_cap_is_exceeded(self, division: Any) -> None:
        total, weights, caps = division
        result = shares(total, weights, caps)
        assert sum(result) == total
        assert all(0 <= share <= cap for share, cap in zip(result, caps, strict=True))

    @given(divisions())
    def test_of_equal_caps_the_heavier_never_gets_less(self, division: Any) -> None:
        total, weights, caps = division
        parts = sorted(zip(caps, weights, shares(total, weights, caps), strict=True))
        for (cap, weight, share), (next_cap, heavier, next_share) in pairwise(parts):
            assert cap != next_cap or weight == heavier or share <= next_share

    @given(divisions(), st.integers(0, 6), st.floats(1, 100))
    def test_more_weight_never_gives_less(self, division: Any, part: int, factor: float) -> None:
        total, weights, caps = division
        part %= len(caps)
        heavier = [*weights[:part], weights[part] * factor, *weights[part + 1 :]]
        assert shares(total, heavier, caps)[part] >= shares(total, weights, caps)[part]

    @given(divisions())
    def test_it_equals_largest_remainder_in_exact_fractions(self, division: Any) -> None:
        total, weights, caps = division
        weights = [float(round(weight) % 5) for weight in weights]
        assert shares(total, weights, caps) == naive_shares(total, weights, caps)

    def test_the_largest_remainders_are_rounded_up(self) -> None:
        assert shares(10, [0.55, 0.25, 0.2], [10, 10, 10]) == [6, 2, 2]  # quotas 5.5, 2.5, 2
        assert shares(10, [0.54, 0.27, 0.19], [10, 10, 10]) == [5, 3, 2]  # quotas 5.4, 2.7, 1.9

    def test_of_equal_parts_the_first_gets_the_odd_token(self) -> None:
        assert shares(5, [1, 1, 1], [9, 9, 9]) == [2, 2, 1]

    def test_what_a_full_part_leaves_goes_to_the_others_by_weight(self) -> None:
        assert shares(100, [6, 3, 1], [20, 90, 90]) == [20, 60, 20]
        assert shares(100, [6, 3, 1], [20, 50, 90]) == [20, 50, 30]

    def test_parts_without_weight_get_only_what_the_others_leave(self) -> None:
        assert shares(10, [0, 1, 0], [9, 9, 9]) == [1, 9, 0]
        assert shares(9, [0, 1, 0], [9, 9, 9]) == [0, 9, 0]

    def test_without_any_weight_the_caps_decide(self) -> None:
        assert shares(12, [0, 0, 0], [12, 6, 6]) == [6, 3, 3]
        assert shares(12, [float("nan")] * 3, [12, 6, 6]) == [6, 3, 3]

    def test_a_total_above_all_caps_fills_everything(self) -> None:
        assert shares(1000, [1, 0, 5], [3, 4, 5]) == [3, 4, 5]

    def test_rows_do_not_touch_each_other(self) -> None:
        rows = [
            (10, [1.0, 2.0, 3.0], [9, 9, 9]),
            (7, [0.0, 0.0, 1.0], [4, 2, 1]),
            (0, [1.0, 1.0, 1.0], [1, 2, 3]),
        ]
        totals, weights, caps = (torch.tensor(column) for column in zip(*rows, strict=True))
        together = integer_shares(totals, weights.double(), caps)
        assert together.tolist() == [shares(*row) for row in rows]


@st.composite
def images(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Visual content scores and real tokens of an image; the full-image's are all real."""
    num_sub_images = draw(st.integers(1, 6))
    scores = draw(st.lists(weights, min_size=num_sub_images, max_size=num_sub_images))
    num_real = draw(st.lists(st.integers(0, 64), min_size=num_sub_images, max_size=num_sub_images))
    return scores, [64, *num_real]


def allocation(num_tokens: int, scores: list[float], num_real: list[int], alpha: float) -> list[int]:
    counts = allocate(torch.tensor([num_tokens]), torch.tensor([scores]), torch.tensor([num_real]), alpha)
    result: list[int] = counts[0].tolist()
    return result


alphas = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
budgets = st.one_of(
    st.builds(lambda rate: Budget(rate=rate), st.floats(0.001, 1)),
    st.builds(lambda tokens: Budget(tokens=tokens), st.integers(1, 1000)),
)


class TestAllocate:
    @given(images(), budgets, alphas)
    def test_the_budget_is_used_to_the_token_and_no_partition_exceeds_its_real_tokens(
        self, image: tuple[list[float], list[int]], budget: Budget, alpha: float
    ) -> None:
        scores, num_real = image
        num_tokens = budget.num_tokens(sum(num_real))
        counts = allocation(num_tokens, scores, num_real, alpha)
        assert sum(counts) == num_tokens
        assert all(0 <= count <= real for count, real in zip(counts, num_real, strict=True))

    @given(images(), budgets, alphas)
    def test_the_full_image_gets_its_share_or_what_the_sub_images_cannot_take(
        self, image: tuple[list[float], list[int]], budget: Budget, alpha: float
    ) -> None:
        scores, num_real = image
        num_tokens = budget.num_tokens(sum(num_real))
        share = min(int(alpha * num_tokens + 1e-9), num_real[0])
        full_image, *sub_images = allocation(num_tokens, scores, num_real, alpha)
        assert full_image == share or (full_image > share and sub_images == num_real[1:])

    @given(images(), budgets, alphas)
    def test_a_sub_image_of_higher_score_and_equal_size_never_gets_fewer(
        self, image: tuple[list[float], list[int]], budget: Budget, alpha: float
    ) -> None:
        scores, num_real = image
        counts = allocation(budget.num_tokens(sum(num_real)), scores, num_real, alpha)
        sub_images = sorted(zip(num_real[1:], scores, counts[1:], strict=True))
        for (real, score, count), (next_real, higher, next_count) in pairwise(sub_images):
            assert real != next_real or score == higher or count <= next_count

    @given(images(), alphas)
    def test_the_whole_budget_keeps_everything(
        self, image: tuple[list[float], list[int]], alpha: float
    ) -> None:
        scores, num_real = image
        assert allocation(sum(num_real), scores, num_real, alpha) == num_real

    def test_content_in_the_right_half_alone_gets_all_sub_image_tokens(self) -> None:
        """The example that the published code answers with 72 for each."""
        assert allocation(576, [0, 1, 0, 1], [576] * 5, 0.5) == [288, 0, 144, 0, 144]

    def test_the_full_images_share_is_rounded_down_but_never_below_an_integer_that_was_meant(self) -> None:
        assert allocation(99, [1], [576, 576], 0.29) == [28, 71]
        assert allocation(100, [1], [576, 576], 0.29) == [29, 71]  # 0.29 * 100 falls just below 29

    def test_alpha_zero_gives_the_full_image_only_what_sub_images_cannot_take(self) -> None:
        assert allocation(20, [1, 1], [16, 16, 16], 0.0) == [0, 10, 10]
        assert allocation(40, [1, 1], [16, 16, 16], 0.0) == [8, 16, 16]

    def test_alpha_one_gives_sub_images_only_what_the_full_image_cannot_take(self) -> None:
        assert allocation(10, [1, 3], [16, 16, 16], 1.0) == [10, 0, 0]
        assert allocation(20, [1, 3], [16, 16, 16], 1.0) == [16, 1, 3]

    def test_one_token_goes_where_alpha_lets_it(self) -> None:
        assert allocation(1, [1, 3], [16, 16, 16], 0.5) == [0, 0, 1]
        assert allocation(1, [1, 3], [16, 16, 16], 1.0) == [1, 0, 0]

    def test_a_sub_image_of_padding_alone_gets_nothing(self) -> None:
        assert allocation(20, [5, 1, 1], [16, 0, 16, 16], 0.5) == [10, 0, 5, 5]


class TestVisualContentScores:
    def test_a_patch_across_two_sub_images_counts_for_each_by_its_area(self) -> None:
        attention = torch.tensor([[1.0, 4.0, 2.0]])
        overlap = torch.tensor([[[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]]])
        assert visual_content_scores(attention, overlap).tolist() == [[2.0, 5.0]]
