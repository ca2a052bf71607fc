"""divprune, scope, hired-scope, hired-spread and cdpruner, read token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hired import policies
from hired.budget import Budget
from hired.errors import ConfigurationError
from hired.policies.cdpruner import CdPruner, against_text
from hired.policies.divprune import DivPrune
from hired.policies.hired import Hired
from hired.policies.hired_scope import HiredScope
from hired.policies.hired_spread import HiredSpread, spread_out
from hired.policies.scope import Scope
from hired.types import Grid, Size
from tests.candidates import (
    EXAMPLES,
    FEATURE_LAYER,
    Picture,
    candidates,
    kept,
    naive_cosine,
    naive_even_shares,
    patches_of,
    real_of,
)

BUDGETS = [Budget(tokens=1), Budget(rate=0.05), Budget(rate=0.2), Budget(rate=0.4), Budget(rate=0.9)]

each_case = pytest.mark.parametrize(
    ("picture", "budget"), [(picture, budget) for picture in EXAMPLES[:3] for budget in BUDGETS]
)


def all_real(picture: Picture) -> list[tuple[int, int]]:
    """(partition, patch) of every real patch."""
    return [(number, patch) for number, patches in enumerate(real_of(picture)) for patch in patches]


def by_partition(picture: Picture, places: list[tuple[int, int]]) -> list[list[int]]:
    return [
        sorted(patch for partition, patch in places if partition == number)
        for number in range(picture.grid.num_partitions)
    ]


class TestHiredSpread:
    @each_case
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        places = all_real(picture)
        attention = picture.attention(FEATURE_LAYER)
        weight = {}
        for partition, patches in enumerate(real_of(picture)):
            whole = sum(float(attention[partition][patch]) for patch in patches)
            for patch in patches:
                weight[partition, patch] = math.sqrt(float(attention[partition][patch]) / whole)
        chosen: list[tuple[int, int]] = []
        while len(chosen) < budget.num_tokens(len(places)):
            chosen.append(
                max(
                    (place for place in places if place not in chosen),
                    key=lambda place: (
                        weight[place]
                        * min(
                            (
                                1 - naive_cosine(picture.features[place], picture.features[one])
                                for one in chosen
                            ),
                            default=1.0,
                        )
                    ),
                )
            )
        assert patches_of(HiredSpread(), picture, budget) == by_partition(picture, chosen)

    def test_power_0_looks_at_distance_alone(self) -> None:
        alike = torch.tensor([[[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]]])
        among = torch.ones(1, 3, dtype=torch.bool)
        counts = torch.tensor([2])
        even = spread_out(alike, torch.tensor([[0.4, 0.5, 0.1]]) ** 0, counts, among, 2)
        assert even.tolist() == [[True, False, True]]
        weighed = spread_out(alike, torch.tensor([[0.9, 0.09, 0.001]]), counts, among, 2)
        assert weighed.tolist() == [[True, True, False]]


class TestDivPrune:
    @each_case
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        places = all_real(picture)
        alike = {
            (one, other): naive_cosine(picture.features[one], picture.features[other])
            for one in places
            for other in places
        }
        first = max(places, key=lambda one: min(1 - alike[one, other] for other in places if other != one))
        chosen = [first]
        while len(chosen) < budget.num_tokens(len(places)):
            left = [place for place in places if place not in chosen]
            chosen.append(max(left, key=lambda one: min(1 - alike[one, other] for other in chosen)))
        assert patches_of(DivPrune(), picture, budget) == by_partition(picture, chosen)

    def test_of_twins_one_is_kept(self) -> None:
        picture = Picture(EXAMPLES[0].original, EXAMPLES[0].grid, seed=31)
        picture.features[:, 8:] = picture.features[:, :8]  # the lower half repeats the upper one
        keep = kept(DivPrune(), candidates(DivPrune(), [picture], Budget(rate=0.5)))[0]
        assert not (keep[:, 8:] & keep[:, :8]).any()


def naive_scope(picture: Picture, number: int, patches: list[int], count: int, power: float) -> list[int]:
    features, attention = picture.features[number], picture.attention(FEATURE_LAYER)[number]
    covered = dict.fromkeys(patches, 0.0)
    chosen: list[int] = []

    def score(j: int) -> float:
        gain = sum(max(0.0, naive_cosine(features[i], features[j]) - covered[i]) for i in patches)
        return gain * math.pow(attention[j], power)

    while len(chosen) < count:
        best = max((j for j in patches if j not in chosen), key=score)
        chosen.append(best)
        for i in patches:
            covered[i] = max(covered[i], naive_cosine(features[i], features[best]))
    return sorted(chosen)


class TestScope:
    @each_case
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        shares = naive_even_shares(picture, budget.num_tokens(int(picture.real.sum())))
        expected = [
            naive_scope(picture, number, patches, share, 1.0)
            for number, (patches, share) in enumerate(zip(real_of(picture), shares, strict=True))
        ]
        assert patches_of(Scope(), picture, budget) == expected

    @pytest.mark.parametrize("power", [0.5, 3.0])
    def test_its_power_weighs_attention(self, power: float) -> None:
        picture, budget = EXAMPLES[1], Budget(rate=0.3)
        shares = naive_even_shares(picture, budget.num_tokens(int(picture.real.sum())))
        expected = [
            naive_scope(picture, number, patches, share, power)
            for number, (patches, share) in enumerate(zip(real_of(picture), shares, strict=True))
        ]
        assert patches_of(Scope(power=power), picture, budget) == expected

    def test_the_more_power_the_more_attention_decides(self) -> None:
        picture = Picture(Size(96, 96), Grid(1, 1), seed=12, per_side=12)
        seen = candidates(Scope(), [picture], Budget(rate=0.1))
        attended = picture.attention(FEATURE_LAYER)
        gathered = [float(attended[kept(Scope(power=power), seen)[0]].sum()) for power in (0.0, 1.0, 10.0)]
        assert gathered[0] < gathered[1] < gathered[2]


class TestHiredScope:
    @each_case
    def test_it_allocates_as_hired_and_selects_as_scope(self, picture: Picture, budget: Budget) -> None:
        shares = [len(patches) for patches in patches_of(Hired(), picture, budget)]
        expected = [
            naive_scope(picture, number, patches, share, 1.0)
            for number, (patches, share) in enumerate(zip(real_of(picture), shares, strict=True))
        ]
        assert patches_of(HiredScope(), picture, budget) == expected

    def test_alpha_is_the_full_images_share(self) -> None:
        for alpha in (0.0, 0.3, 1.0):
            budget = Budget(tokens=10, alpha=alpha)
            assert len(patches_of(HiredScope(), EXAMPLES[0], budget)[0]) == 10 * alpha


class TestCdPruner:
    @pytest.mark.parametrize("budget", BUDGETS[:4])
    def test_it_equals_the_largest_determinant_step_by_step(self, budget: Budget) -> None:
        picture = EXAMPLES[1]
        direction = torch.linspace(-1, 1, picture.features.shape[-1])
        places = all_real(picture)
        scores = [float(picture.features[place] @ direction) for place in places]
        relevance = [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]
        kernel = np.array(
            [
                [
                    relevance[i] * relevance[j] * naive_cosine(picture.features[one], picture.features[other])
                    for j, other in enumerate(places)
                ]
                for i, one in enumerate(places)
            ]
        )
        chosen: list[int] = []
        while len(chosen) < budget.num_tokens(len(places)):
            left = [i for i in range(len(places)) if i not in chosen]
            chosen.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
        policy = CdPruner(relevance=lambda features: features @ direction)
        expected = by_partition(picture, [places[i] for i in chosen])
        assert patches_of(policy, picture, budget) == expected

    def test_relevance_to_text_is_the_mean_cosine_with_a_minus(self) -> None:
        texts = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        relevance = against_text(lambda features: 5 * features, texts)
        scores = relevance(torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]]))
        torch.testing.assert_close(scores, torch.tensor([[-0.5, -math.sqrt(0.5), math.sqrt(0.5)]]))

    def test_by_its_name_alone_it_is_refused_with_the_mend(self) -> None:
        with pytest.raises(ConfigurationError, match=r"text tower.*CdPruner\(relevance=against_text"):
            policies.get("cdpruner")
