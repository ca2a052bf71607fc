"""The page says what the figures say."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipeline.evaluation import figures
from pipeline.evaluation.figures import Answers
from pipeline.evaluation.page import page
from pipeline.evaluation.plots import plot, speeds
from pipeline.storage import Store
from tests.pipeline.evaluation.test_figures import ARMS, rows


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return {
        "command": "python jobs/evaluate.py --profile small",
        "commit": "abc",
        "measured_at": "2026-01-01T00:00:00",
        "model": {"name": "embedded", "sha256": "0" * 64},
        "hardware": "2 cores",
        "versions": {"python": "3.12"},
        "split": "test",
        "seed": 1,
        "tasks": [],
        "pictures": 40,
        "items": 120,
        "left_out": {"cdpruner": "needs a text tower"},
        "random_seeds": 2,
        "draws": 400,
        "table": figures.table(Answers.of(rows()), draws=400),
        "speed": {
            "file": "benchmark.json",
            "hardware": "2 cores",
            "command": "python jobs/benchmark.py",
            "commit": "def",
            "images_per_s": {"keep-all": 3.0, "hired-20": 7.0, "hired-33": 5.0},
        },
    }


def test_what_hired_does_not_beat_is_named(record: dict[str, Any]) -> None:
    text = page(record, {})
    line = next(line for line in text.splitlines() if line.startswith("- **20"))
    assert "`hired` scores 75.0 %" in line
    assert "75.0 % of what all tokens score" in line
    assert "No other policy has a higher mean." in line
    # The thumbnail answers every question of presence and hired three of four; random has no chance.
    assert "`thumbnail` is better on presence." in line
    assert "It beats `random` on every task." in line


def test_a_better_policy_is_named_with_its_difference(record: dict[str, Any]) -> None:
    better = ("grid", 0.2)
    arms = {**ARMS, better: (lambda task, picture, number: 1.0, 20, 5)}
    changed = {**record, "table": figures.table(Answers.of(rows(arms)), draws=400)}
    line = next(line for line in page(changed, {}).splitlines() if line.startswith("- **20"))
    assert "The highest mean is that of `grid`, 100.0 %" in line
    assert "+25.0 points" in line
    assert "an order that the interval supports" in line


def test_policies_that_cannot_use_their_budget_are_named(record: dict[str, Any]) -> None:
    assert "`grid` at 20 % uses 75 % of its budget" in page(record, {})


def test_every_arm_and_task_stands_in_the_table(record: dict[str, Any]) -> None:
    text = page(record, {})
    assert "| policy | tokens | reading | presence | mean |" in text
    assert "| hired | 20 + 5 | 75.0 [" in text
    assert "| keep-all | 100 + 10 | 100.0 [100, 100]" in text
    assert "cdpruner, which needs a text tower" in text
    assert "Theirs, not measured here" in text


def test_every_picture_is_drawn_and_shown(record: dict[str, Any], tmp_path: Any) -> None:
    arms = {key: value for key, value in ARMS.items() if key[0] in ("keep-all", "hired")}
    alphas = {(f"alpha {tenth / 10}", 0.2): ARMS["random", 0.2] for tenth in (0, 10)}
    whole = copy.deepcopy(record) | {
        "ablations": figures.ablations(Answers.of(rows(arms | alphas)), 0.2, draws=50),
        "attention": {
            "pictures": 2,
            "of_grid": 1,
            "layers": 2,
            "language_model": {"0.2": 0.5, "0.4": 0.7},
            "by_partition": {"0.1": [1.0, 2.0, 3.0, 4.0, 5.0], "0.2": None},
            "maps": [{"picture": "a", "layers": [[[0.1, 0.2], [0.3, 0.4]]] * 2}],
        },
    }
    drawn = plot(whole, Store(tmp_path))
    assert len(drawn) == 7  # but for the ablations, which are alphas alone here
    text = page(whole, drawn)
    for name in drawn.values():
        assert (tmp_path / name).stat().st_size > 2000
        assert f"]({name})" in text
    assert "The best alpha here is 0.5" in text
    assert "| here, top 10 % | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 |" in text
    assert "top 20 % hold 50 %" in text


def test_speeds_are_shown_of_arms_that_both_records_have(record: dict[str, Any]) -> None:
    assert [(name, rate) for name, rate, _ in speeds(record)] == [("keep-all", 3.0), ("hired 20 %", 7.0)]
    assert speeds({**record, "speed": None}) == []
