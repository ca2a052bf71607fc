"""What holds for all policies: the budget to the token, no padding, no neighbours, no waiting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hired import policies
from hired.budget import Budget
from hired.policies import Merged, Policy
from hired.policies.cdpruner import CdPruner
from tests.candidates import EXAMPLES, Picture, budgets, candidates, kept, pictures

NAMES = [*(name for name in policies.names() if name != "cdpruner"), "cdpruner"]

every_policy = pytest.mark.parametrize("name", NAMES)


def policy_of(name: str) -> Policy:
    """By its name; cdpruner has none to be made by, and finds relevant what is large."""
    if name == "cdpruner":
        return CdPruner(relevance=lambda features: features.sum(-1))
    return policies.get(name)


def expected(policy: Policy, budget: Budget, picture: Picture) -> int:
    """How many tokens remain of a picture."""
    real = picture.real
    if policy.name == "keep-all":
        return int(real.sum())
    num_tokens = budget.num_tokens(int(real.sum()))
    return min(num_tokens, int(real[0].sum())) if policy.name == "thumbnail" else num_tokens


def answer(policy: Policy, batch: list[Picture], budget: Budget) -> tuple[Tensor, Tensor | None]:
    """Kept places, and merged features where the policy merges, zero where nothing is kept."""
    chosen = policy.select(candidates(policy, batch, budget))
    if isinstance(chosen, Merged):
        return chosen.keep, chosen.features * chosen.keep[..., None]
    return chosen, None


@every_policy
class TestEveryPolicy:
    @settings(max_examples=40)
    @given(batch=st.lists(pictures(), min_size=1, max_size=3), budget=budgets)
    def test_the_budget_is_used_to_the_token_and_padding_is_never_kept(
        self, name: str, batch: list[Picture], budget: Budget
    ) -> None:
        policy = policy_of(name)
        seen = candidates(policy, batch, budget)
        keep = kept(policy, seen)
        assert keep.dtype == torch.bool
        assert not (keep & ~seen.real).any()
        for image, picture in zip(keep, batch, strict=True):
            if name == "hired-reference":  # loses what floors, limits and padding take
                assert 1 <= int(image.sum()) <= policy.num_tokens(budget, picture.real)
            else:
                assert int(image.sum()) == expected(policy, budget, picture)

    @settings(max_examples=20)
    @given(batch=st.lists(pictures(), min_size=2, max_size=3), budget=budgets)
    def test_a_pictures_tokens_are_the_same_in_any_company_and_order(
        self, name: str, batch: list[Picture], budget: Budget
    ) -> None:
        policy = policy_of(name)
        together, features = answer(policy, batch, budget)
        backwards, _ = answer(policy, batch[::-1], budget)
        assert together.flip(0).equal(backwards)
        for number, picture in enumerate(batch):
            alone, own_features = answer(policy, [picture], budget)
            num = picture.grid.num_partitions
            assert together[number, :num].equal(alone[0])
            assert not together[number, num:].any()
            if features is not None and own_features is not None:
                torch.testing.assert_close(features[number, :num], own_features[0])

    def test_the_same_question_has_the_same_answer(self, name: str) -> None:
        for budget in (Budget(rate=0.2), Budget(rate=0.7)):
            one, _ = answer(policy_of(name), EXAMPLES[:3], budget)
            again, _ = answer(policy_of(name), EXAMPLES[:3], budget)
            assert one.equal(again)

    def test_a_rate_of_one_keeps_everything_that_the_policy_looks_at(self, name: str) -> None:
        if name == "hired-reference":
            return  # its limits are its own
        policy = policy_of(name)
        for picture in EXAMPLES:
            keep = kept(policy, candidates(policy, [picture], Budget(rate=1.0)))[0]
            looked_at = picture.real.clone()
            looked_at[1:] &= name != "thumbnail"
            assert keep.equal(looked_at)

    def test_it_never_waits_for_the_device(self, name: str) -> None:
        """On the meta device there are no values to wait for, and asking for one is an error."""
        policy = policy_of(name)
        seen = candidates(policy, EXAMPLES[:3], Budget(rate=0.2), device="meta")
        keep = kept(policy, seen)
        assert (keep.shape, keep.dtype) == (seen.real.shape, torch.bool)

    def test_a_tower_that_overflowed_does_not_upset_the_count(self, name: str) -> None:
        """Half precision can; such a picture still gives its budget's number of real tokens."""
        policy, budget = policy_of(name), Budget(rate=0.3)
        [picture] = EXAMPLES[:1]
        for spoilt in (float("nan"), float("inf")):
            broken = Picture(picture.original, picture.grid, seed=77)
            for values in (broken.features, broken.keys, broken.single_head):
                values[1] = spoilt
            seen = candidates(policy, [broken, picture], budget)
            for attention in seen.cls_attention.values():
                attention[0, 1] = spoilt
            keep = kept(policy, seen)
            assert not (keep & ~seen.real).any()
            if name != "hired-reference":
                assert int(keep[0].sum()) == expected(policy, budget, broken)
            assert keep[1].equal(kept(policy, candidates(policy, [picture], budget))[0])
