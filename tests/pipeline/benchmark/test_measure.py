"""Repeats, medians, and words where there is no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hired.errors import CapacityError
from pipeline.benchmark.measure import (
    NOT_MEASURED,
    OUT_OF_MEMORY,
    digits,
    interleaved,
    percentile,
    ratio,
    spread,
)


def test_trials_take_turns_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []

    def trial(name: str) -> Callable[[], int]:
        def run() -> int:
            calls.append(name)
            return len(calls)

        return run

    results = interleaved({"a": trial("a"), "b": trial("b")}, repeats=2)
    assert "".join(calls) == "ababab"
    assert results == {"a": [3, 5], "b": [4, 6]}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, CapacityError])
def test_a_trial_without_memory_is_tried_once_and_its_neighbour_goes_on(error: type[Exception]) -> None:
    calls = []

    def greedy() -> int:
        calls.append(1)
        raise error("no room")

    assert interleaved({"greedy": greedy, "modest": lambda: 7}, repeats=2) == {
        "greedy": OUT_OF_MEMORY,
        "modest": [7, 7],
    }
    assert len(calls) == 1


def test_any_other_error_is_raised() -> None:
    def broken() -> int:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        interleaved({"broken": broken}, repeats=1)


def test_ratios_come_from_medians() -> None:
    one, other = spread([1.0, 3.0, 100.0]), spread([2.0, 2.0, 2.0])
    assert one == {"median": 3.0, "min": 1.0, "max": 100.0}
    assert ratio(one, other) == 1.5
    assert ratio(one, OUT_OF_MEMORY) == NOT_MEASURED
    assert ratio(None, other) == NOT_MEASURED


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.99, 1.0]))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_figures_have_four_digits() -> None:
    assert digits(123456.0) == 123500
    assert digits(0.00012345) == 0.0001234
