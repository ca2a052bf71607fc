"""The bootstrap against what is known of means, and the reasons for pairing and for drawing pictures."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hired.evaluation.statistics import Bootstrap, Weights, mean, mean_over_tasks, over_seeds

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.random(400)


def test_a_means_interval_is_that_of_the_normal_distribution() -> None:
    found = Bootstrap(range(400)).interval(mean(SCORES))
    error = SCORES.std() / 400**0.5
    assert found.measured == pytest.approx(SCORES.mean())
    assert found.low == pytest.approx(SCORES.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(SCORES.mean() + 1.96 * error, abs=0.1 * error)
    narrower = Bootstrap(range(400)).interval(mean(SCORES), level=0.5)
    assert found.low < narrower.low < narrower.high < found.high


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        found = Bootstrap(range(60), num_draws=400).interval(mean(random.random(60) < 0.7))
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 300 <= 0.98


def test_the_same_draws_for_both_make_a_small_difference_visible() -> None:
    hard = RANDOM.normal(0, 1, 400)
    better = hard + RANDOM.normal(0.03, 0.1, 400)
    draws = Bootstrap(range(400))
    apart, other = draws.interval(mean(better)), draws.interval(mean(hard))
    assert apart.low < other.high  # taken each alone nothing could be said
    paired = draws.difference(mean(better), mean(hard))
    assert paired.excludes_zero
    assert paired.measured == pytest.approx((better - hard).mean())
    assert draws.difference(mean(hard), mean(hard)).low == 0
    assert not draws.difference(mean(hard), mean(hard)).excludes_zero


def test_questions_about_one_picture_are_drawn_together() -> None:
    """Ten copies of a question tell no more than one, however many rows they make."""
    copies = np.repeat(SCORES[:40], 10)
    together = Bootstrap(np.repeat(np.arange(40), 10).tolist()).interval(mean(copies))
    alone = Bootstrap(range(40)).interval(mean(SCORES[:40]))
    as_if_apart = Bootstrap(range(400)).interval(mean(copies))
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert together.high - together.low > 2.5 * (as_if_apart.high - as_if_apart.low)


def test_every_task_counts_the_same_and_keeps_its_number_of_pictures() -> None:
    tasks = ["read"] * 300 + ["count"] * 100
    scores = [1.0] * 300 + [0.0] * 100
    statistic = mean_over_tasks(scores, tasks)
    found = Bootstrap(range(400), tasks).interval(statistic)
    assert (found.measured, found.low, found.high) == (0.5, 0.5, 0.5)
    pooled = Bootstrap(range(400), tasks).interval(mean(scores))
    assert (pooled.measured, pooled.low, pooled.high) == (0.75, 0.75, 0.75)


def test_a_picture_in_two_tasks_is_drawn_for_each() -> None:
    tasks = ["read"] * 50 + ["count"] * 50
    scores = np.concatenate([SCORES[:50], 1 - SCORES[:50]])
    found = Bootstrap([*range(50), *range(50)], tasks).interval(mean_over_tasks(scores, tasks))
    assert found.low < 0.5 < found.high


def test_other_statistics_follow_from_how_often_items_are_drawn() -> None:
    says_yes, is_yes = RANDOM.random(200) < 0.5, RANDOM.random(200) < 0.5

    def precision(weights: Weights) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            result: NDArray[np.float64] = weights @ (says_yes & is_yes) / (weights @ says_yes)
        return result

    found = Bootstrap(range(200)).interval(precision)
    assert found.measured == pytest.approx(is_yes[says_yes].mean())
    assert found.low < found.measured < found.high


def test_draws_without_a_value_are_left_out() -> None:
    def first_alone(weights: Weights) -> NDArray[np.float64]:
        return np.where(weights[:, 0] > 0, 1.0, np.nan)

    found = Bootstrap(range(3)).interval(first_alone)
    assert (found.low, found.high) == (1.0, 1.0)


def test_the_seed_decides() -> None:
    one, again, other = (Bootstrap(range(400), seed=seed).interval(mean(SCORES)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one.low == pytest.approx(other.low, abs=0.1 * (one.high - one.low))


def test_runs_of_several_seeds_are_averaged_item_by_item() -> None:
    averaged = over_seeds({0: [1.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0]})
    assert averaged.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match=r"got \[1, 2\] items"):
        over_seeds({0: [1.0], 1: [1.0, 0.0]})
    with pytest.raises(ValueError, match="got"):
        over_seeds({})


@pytest.mark.parametrize("scores", [[float("nan")], [[1.0]], [float("inf")]])
def test_scores_that_are_no_numbers_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite number"):
        mean(scores)


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        Bootstrap([])
    with pytest.raises(ValueError, match="zip"):
        Bootstrap(["a"], ["read", "count"])
