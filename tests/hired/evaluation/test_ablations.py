"""HiRED with one decision changed: exact budgets, naive references, and all departures together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from hired.attention import most_attended
from hired.budget import Budget
from hired.errors import ConfigurationError
from hired.evaluation.ablations import Ablation, variants
from hired.partitioning import partition
from hired.policies.hired import Hired
from hired.policies.hired_reference import HiredReference
from hired.types import Grid, Size
from tests.candidates import EXAMPLES, FEATURE_LAYER, Picture, budgets, candidates, kept, patches_of, pictures
from tests.pictures import picture
from tests.towers import encoder_of, tiny_tower

HALF = Budget(rate=0.5)
ARMS = variants(HALF, feature_layer=FEATURE_LAYER, num_heads=2)
LOSING = ("floors given away to nobody", "padding chosen", "all four departures")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
@settings(max_examples=25)
@given(image=pictures(), budget=budgets)
def test_every_variant_keeps_its_budget_and_no_padding(arm: object, image: Picture, budget: Budget) -> None:
    policy, name = arm.policy, arm.name  # type: ignore[attr-defined]
    keep = kept(policy, candidates(policy, [image], budget))[0]
    assert not (keep & ~image.real).any()
    num_tokens = budget.num_tokens(int(image.real.sum()))
    if name in LOSING:
        assert 1 <= int(keep.sum()) <= policy.num_tokens(budget, image.real)
    else:
        assert int(keep.sum()) == num_tokens


@pytest.mark.parametrize("image", EXAMPLES)
@given(budget=budgets)
def test_without_options_it_is_hired(image: Picture, budget: Budget) -> None:
    assert patches_of(Ablation(), image, budget) == patches_of(Hired(), image, budget)


# At alpha 1 none is a top patch: the published code divides 0 by 0, and each of ours decides on its own.
@settings(max_examples=150)
@given(image=pictures(), budget=budgets.filter(lambda budget: budget.alpha < 0.9))
def test_all_departures_together_are_the_published_code(image: Picture, budget: Budget) -> None:
    together = Ablation(row_bands=True, counted=True, floored=True, padded=True)
    reference = HiredReference()
    expected = kept(reference, candidates(reference, [image], budget))[0]
    found = kept(together, candidates(together, [image], budget))[0]
    if int(expected.sum()) > 1:
        assert found.equal(expected)


def shares(policy: Hired, image: Picture, budget: Budget) -> list[int]:
    return policy.allocate(candidates(policy, [image], budget))[0].tolist()


class TestAllocation:
    image = Picture(Size(64, 64), Grid(2, 2), seed=1)

    def test_even_shares_do_not_look_at_the_content(self) -> None:
        assert shares(Ablation(even=True), self.image, Budget(tokens=30)) == [15, 4, 4, 4, 3]
        assert shares(Hired(), self.image, Budget(tokens=30))[1:] != [4, 4, 4, 3]

    def test_what_an_even_share_has_no_room_for_goes_to_the_others(self) -> None:
        image = Picture(Size(60, 200), Grid(2, 2), seed=2)
        room = image.real.sum(-1).tolist()
        found = shares(Ablation(even=True), image, Budget(rate=0.9))
        assert sum(found) == Budget(rate=0.9).num_tokens(sum(room))
        assert all(one <= limit for one, limit in zip(found, room, strict=True))

    def test_row_bands_are_runs_of_the_full_image(self) -> None:
        attention = self.image.attention(0)[0]
        weights = [float(attention[4 * i : 4 * i + 4].sum()) for i in range(4)]
        found = shares(Ablation(row_bands=True), self.image, Budget(tokens=30))
        for share, weight in zip(found[1:], weights, strict=True):
            assert abs(share - 15 * weight / sum(weights)) < 1

    def test_counted_patches_are_those_of_the_top_in_each_quadrant(self) -> None:
        top = self.image.attention(0)[0].argsort(descending=True)[:8]  # int(16 * (1 - 0.5))
        quadrant = top // 8 * 2 + top % 4 // 2
        counts = torch.bincount(quadrant, minlength=4).tolist()
        found = shares(Ablation(counted=True), self.image, Budget(tokens=16))
        assert [8, *counts] == found  # eight tokens, eight top patches

    def test_floors_are_given_to_nobody(self) -> None:
        exact = shares(Ablation(), self.image, Budget(tokens=39))
        floored = shares(Ablation(floored=True), self.image, Budget(tokens=39))
        assert sum(exact) == 39
        assert 39 - 4 < sum(floored) < 39
        assert all(0 <= e - f <= 1 for e, f in zip(exact, floored, strict=True))

    def test_a_budget_that_counts_padding_is_larger_and_loses_what_falls_into_it(self) -> None:
        image = Picture(Size(60, 200), Grid(2, 2), seed=2)
        policy = Ablation(padded=True)
        assert policy.num_tokens(HALF, image.real) == 40
        keep = kept(policy, candidates(policy, [image], HALF))[0]
        assert int(keep.sum()) < 40


class TestHeads:
    image = Picture(Size(96, 96), Grid(3, 3), seed=3)

    @pytest.mark.parametrize("heads", [0, 1, "max"])
    def test_selection_follows_the_aggregated_heads(self, heads: object) -> None:
        policy = Ablation(heads=heads)  # type: ignore[arg-type]
        by_head = self.image.by_head(FEATURE_LAYER)
        importance = by_head.amax(-1) if heads == "max" else by_head[..., heads]  # type: ignore[index]
        counts = torch.tensor(shares(policy, self.image, HALF))
        expected = most_attended(importance, counts, among=self.image.real)
        assert kept(policy, candidates(policy, [self.image], HALF))[0].equal(expected)
        assert not expected.equal(kept(Hired(), candidates(Hired(), [self.image], HALF))[0])

    def test_a_head_that_is_not_there_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigurationError, match="heads 0 to 1"):
            patches_of(Ablation(heads=2), self.image, HALF)

    def test_the_towers_heads_reach_the_policy_whatever_the_company(self) -> None:
        encoder = encoder_of(tiny_tower())
        images = [partition(picture(*size, noise=80), encoder.tiling) for size in ((64, 64), (100, 60))]
        policy = Ablation(heads=2)
        for image, tokens in zip(images, encoder.encode(images, budget=HALF, policy=policy), strict=True):
            [alone] = encoder.encode([image], budget=HALF, policy=policy)
            assert tokens.patch.tolist() == alone.patch.tolist()
        summed = encoder.encode(images, budget=HALF, policy="hired")
        one = encoder.encode(images, budget=HALF, policy=policy)
        assert [t.patch.tolist() for t in summed] != [t.patch.tolist() for t in one]


def test_variants_have_names_of_their_own_and_change_one_thing() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {"hired", "even allocation", "allocation by layer 3", "selection by layer 0", "head 1 alone"} < {
        *names
    }
    assert {arm.budget.alpha for arm in ARMS} == {i / 10 for i in range(11)}
    plain = [arm for arm in ARMS if arm.policy == Hired() and arm.budget == HALF]
    assert [arm.name for arm in plain] == ["hired", "compact positions", "all newlines", "no newlines"]
