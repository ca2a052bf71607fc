"""What is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from hired import policies
from hired.errors import ConfigurationError
from hired.policies.policy import Policy
from hired.policies.prumerge import PruMerge
from hired.policies.random import Random
from hired.policies.thumbnail import Thumbnail
from pipeline.evaluation.arms import ablation_arms, described, fastv_arms, table_arms
from pipeline.evaluation.options import POLICIES, Options


class Mine(Thumbnail):
    name = "mine"


def no_policy() -> object:
    return object()


def test_the_full_profile_compares_every_policy_at_every_budget() -> None:
    arms = table_arms(Options())
    names = {arm.name for arm in arms}
    assert set(POLICIES) | {"full-image", "random#1", "random#2"} == names
    assert set(policies.names()) - set(POLICIES) == {"cdpruner"}
    for name in set(POLICIES) - {"keep-all"}:
        assert [arm.budget.rate for arm in arms if arm.name == name] == [0.4, 0.2, 0.1, 0.05]
    assert len({(arm.name, arm.budget) for arm in arms}) == len(arms)


def test_random_draws_differently_under_each_seed() -> None:
    arms = [arm for arm in table_arms(Options(budgets=(0.2,))) if arm.name.startswith("random")]
    assert [arm.policy for arm in arms] == [Random(0), Random(1), Random(2)]


@pytest.mark.parametrize(("model", "layers_above"), [("embedded", 0), ("some/other", 1), ("own", 0)])
def test_prumerge_reads_no_layer_that_was_never_trained(
    model: str, layers_above: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "training.json").write_text("{}")
    arms = table_arms(Options(model=model, policies=("prumerge", "prumerge+")))
    read = [arm.policy.layers_above for arm in arms if isinstance(arm.policy, PruMerge)]
    assert read == [layers_above] * 8


def test_a_policy_of_ones_own_is_named_by_its_place() -> None:
    arms = table_arms(Options(policies=(f"{__name__}:Mine",), budgets=(0.3,)))
    assert isinstance(arms[-1].policy, Policy)
    assert (arms[-1].name, arms[-1].budget.rate) == ("mine", 0.3)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("no_such_module:Mine", "cannot be had"),
        (f"{__name__}:Yours", "cannot be had"),
        (f"{__name__}:no_policy", "which is no Policy"),
        ("unheard-of", "there is no policy"),
    ],
)
def test_what_is_no_policy_is_an_error_before_anything_runs(place: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        table_arms(Options(policies=(place,)))


def test_every_ablation_has_a_name_of_its_own_at_the_ablations_budget() -> None:
    arms = ablation_arms(Options(ablation_budget=0.15), feature_layer=4, num_heads=3)
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.budget.rate for arm in arms} == {1.0, 0.15}
    assert {"keep-all", "hired", "even allocation", "compact positions", "alpha 0.0"} <= {
        arm.name for arm in arms
    }


def test_fastv_has_an_arm_for_each_number_of_whole_layers_at_every_budget() -> None:
    arms = fastv_arms(Options(fastv_layers=(1, 3), budgets=(0.4, 0.1)), num_layers=4)
    assert [(arm.name, arm.budget.rate) for arm in arms] == [
        ("fastv K=1", 0.4), ("fastv K=1", 0.1), ("fastv K=3", 0.4), ("fastv K=3", 0.1)
    ]  # fmt: skip
    assert len({str(described(arm)) for arm in arms}) == len(arms)


def test_fastv_needs_a_layer_to_drop_in() -> None:
    with pytest.raises(ConfigurationError, match="has 3 layers, of which 1 to 2 can see all tokens"):
        fastv_arms(Options(fastv_layers=(1, 3)), num_layers=3)


def test_arms_that_answer_differently_are_described_differently() -> None:
    arms = [
        *table_arms(Options()),
        *ablation_arms(Options(), feature_layer=4, num_heads=3)[2:],
    ]
    described_as = {repr(described(arm) | {"name": ""}) for arm in arms}
    assert len(described_as) == len(arms)
