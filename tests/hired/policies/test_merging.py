"""prumerge, prumerge+ and visionzip, read token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hired.budget import Budget, integer_shares
from hired.policies import Merged, Policy
from hired.policies.prumerge import PruMerge, num_outliers
from hired.policies.prumerge_plus import PruMergePlus
from hired.policies.visionzip import VisionZip
from hired.types import Grid, Size
from tests.candidates import (
    EXAMPLES,
    FEATURE_LAYER,
    Picture,
    candidates,
    naive_cosine,
    naive_even_shares,
    real_of,
)

BUDGETS = [Budget(rate=0.05), Budget(rate=0.2), Budget(rate=0.4), Budget(rate=0.9), Budget(rate=1.0)]

each_case = pytest.mark.parametrize(
    ("picture", "budget"), [(picture, budget) for picture in EXAMPLES for budget in BUDGETS]
)


def answer(policy: Policy, picture: Picture, budget: Budget) -> Merged:
    chosen = policy.select(candidates(policy, [picture], budget))
    assert isinstance(chosen, Merged)
    return chosen


def assert_tokens(merged: Merged, expected: list[dict[int, Tensor]]) -> None:
    """Kept places and their features, partition by partition."""
    for keep, features, tokens in zip(merged.keep[0], merged.features[0], expected, strict=True):
        assert keep.nonzero()[:, 0].tolist() == sorted(tokens)
        for patch, token in tokens.items():
            torch.testing.assert_close(features[patch], token, atol=1e-5, rtol=1e-5)


def naive_outliers(attention: list[float]) -> int:
    first, third = np.percentile(attention, [25, 75])
    return int(sum(value > third + 1.5 * (third - first) for value in attention))


def naive_counts(picture: Picture, num_tokens: int) -> list[int]:
    real = real_of(picture)
    outliers = [
        naive_outliers([float(picture.single_head[number, patch]) for patch in patches]) if patches else 0
        for number, patches in enumerate(real)
    ]
    sizes = torch.tensor([[len(patches) for patches in real]])
    counts: list[int] = integer_shares(torch.tensor([num_tokens]), torch.tensor([outliers]), sizes)[
        0
    ].tolist()
    return counts


def naive_prumerge(
    picture: Picture, number: int, kept: list[int], patches: list[int], num_nearest: int
) -> dict[int, Tensor]:
    """The tokens of one partition of which ``kept`` are the places."""
    attention, keys, features = (
        tensor[number] for tensor in (picture.single_head, picture.keys, picture.features)
    )
    by_attention = sorted(kept, key=lambda patch: -float(attention[patch]))
    core = by_attention[:-1] if 1 < len(kept) < len(patches) else by_attention
    tokens = {}
    for i in core:
        others = sorted((j for j in patches if j != i), key=lambda j: -naive_cosine(keys[i], keys[j]))
        tokens[i] = features[i].clone()
        for j in others[:num_nearest]:
            tokens[i] += attention[j] * features[j]
    if len(core) < len(kept):
        tokens[by_attention[-1]] = torch.stack(
            [attention[j] * features[j] for j in patches if j not in core]
        ).sum(0)
    return tokens


class TestPruMerge:
    @each_case
    @pytest.mark.parametrize("num_nearest", [3, 32])
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget, num_nearest: int) -> None:
        counts = naive_counts(picture, budget.num_tokens(int(picture.real.sum())))
        expected = []
        for number, (patches, count) in enumerate(zip(real_of(picture), counts, strict=True)):
            attention = picture.single_head[number]
            kept = sorted(patches, key=lambda patch: -float(attention[patch]))[:count]
            expected.append(naive_prumerge(picture, number, kept, patches, num_nearest))
        assert_tokens(answer(PruMerge(num_nearest=num_nearest), picture, budget), expected)

    def test_at_the_published_number_of_tokens_the_published_ones_are_kept(self) -> None:
        picture = Picture(Size(64, 64), Grid(2, 2), seed=8, per_side=12)
        picture.single_head.copy_(picture.attention(FEATURE_LAYER))  # with a few that stand out
        outliers = [naive_outliers(row.tolist()) for row in picture.single_head]
        assert all(1 < count < 72 for count in outliers)
        merged = answer(PruMerge(), picture, Budget(tokens=sum(outliers)))
        assert merged.keep[0].sum(-1).tolist() == outliers

    def test_outliers_are_those_of_numpys_percentiles(self) -> None:
        for picture in EXAMPLES:
            expected = [
                naive_outliers([float(picture.single_head[number, patch]) for patch in patches])
                if patches
                else 0
                for number, patches in enumerate(real_of(picture))
            ]
            assert num_outliers(picture.single_head, picture.real).tolist() == expected

    def test_it_reads_the_layer_above_the_features_unless_told_otherwise(self) -> None:
        for policy, layer in ((PruMerge(), 1), (PruMerge(layers_above=0), 0), (PruMergePlus(), 1)):
            asked = []
            seen = candidates(policy, EXAMPLES[:1], Budget(rate=0.2))
            single_head = seen.single_head

            def witness(layers_above: int) -> tuple[Tensor, Tensor]:
                asked.append(layers_above)  # noqa: B023
                return single_head(layers_above)  # noqa: B023

            object.__setattr__(seen, "single_head", witness)
            policy.select(seen)
            assert asked == [layer]


class TestPruMergePlus:
    @each_case
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        counts = naive_counts(picture, budget.num_tokens(int(picture.real.sum())))
        expected = []
        for number, (patches, count) in enumerate(zip(real_of(picture), counts, strict=True)):
            attention = picture.single_head[number]
            num_attended = -(-count // 4)
            attended = sorted(patches, key=lambda patch: -float(attention[patch]))[:num_attended]
            rest, num_even = [patch for patch in patches if patch not in attended], count - num_attended
            even = [rest[-(-i * len(rest) // num_even)] for i in range(num_even)]
            expected.append(naive_prumerge(picture, number, [*attended, *even], patches, 32))
        assert_tokens(answer(PruMergePlus(), picture, budget), expected)


class TestVisionZip:
    @each_case
    def test_it_equals_the_naive_reading(self, picture: Picture, budget: Budget) -> None:
        shares = naive_even_shares(picture, budget.num_tokens(int(picture.real.sum())))
        expected = []
        for number, (patches, share) in enumerate(zip(real_of(picture), shares, strict=True)):
            attention = picture.attention(FEATURE_LAYER)[number]
            features, keys = picture.features[number], picture.keys[number]
            num_context = round(share * 10 / 64)
            by_attention = sorted(patches, key=lambda patch: -float(attention[patch]))
            dominant = by_attention[: share - num_context]
            rest = [patch for patch in patches if patch not in dominant]
            context = [rest[-(-i * len(rest) // num_context)] for i in range(num_context)]
            joined: dict[int, list[Tensor]] = {patch: [] for patch in context}
            for patch in rest:
                if context and patch not in context:
                    nearest = max(context, key=lambda i: naive_cosine(keys[i], keys[patch]))
                    joined[nearest].append(features[patch])
            tokens = {patch: features[patch] for patch in dominant}
            for patch, others in joined.items():
                tokens[patch] = features[patch] + (torch.stack(others).mean(0) if others else 0)
            expected.append(tokens)
        assert_tokens(answer(VisionZip(), picture, budget), expected)

    def test_of_64_tokens_ten_are_context(self) -> None:
        picture = Picture(Size(96, 96), Grid(1, 1), seed=9, per_side=12)
        merged = answer(VisionZip(), picture, Budget(tokens=128))
        assert merged.keep[0].sum(-1).tolist() == [64, 64]
        for keep, attention in zip(merged.keep[0], picture.attention(FEATURE_LAYER), strict=True):
            most_attended = set(attention.argsort(descending=True)[:54].tolist())
            kept = set(keep.nonzero()[:, 0].tolist())
            assert most_attended < kept
