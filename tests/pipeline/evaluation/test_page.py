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
from tests.pipeline.evaluation.test_figures import ARMS, fastv_rows, rows


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


def test_a_policy_that_leads_everywhere_and_loses_nowhere_should_be_the_default(
    record: dict[str, Any],
) -> None:
    better = ("grid", 0.2)
    arms = {**ARMS, better: (lambda task, picture, number: 1.0, 20, 5)}
    changed = {**record, "table": figures.table(Answers.of(rows(arms)), draws=400)}
    [line] = [line for line in page(changed, {}).splitlines() if line.startswith("- **The default**")]
    assert "`grid` meets this." in line


def test_the_default_stays_where_the_best_other_policy_loses_a_task(record: dict[str, Any]) -> None:
    # All of reading and half of presence, where hired has three of four of both.
    half = lambda task, picture, number: float(task == "reading" or picture % 2)  # noqa: E731
    arms = {**ARMS, ("grid", 0.2): (half, 20, 5)}
    changed = {**record, "table": figures.table(Answers.of(rows(arms)), draws=400)}
    [line] = [line for line in page(changed, {}).splitlines() if line.startswith("- **The default**")]
    assert "No policy meets this, and `hired` stays." in line
    assert "The nearest is `grid`: not told apart at 20 %; it loses presence at 20 %." in line


def test_another_models_figures_stand_beside_with_the_orders_that_both_support(
    record: dict[str, Any],
) -> None:
    arms = {**ARMS, ("grid", 0.2): (lambda task, picture, number: 1.0, 15, 6)}
    arms["thumbnail", 0.2] = (lambda task, picture, number: 1.0, 20, 0)
    other = figures.table(Answers.of(rows(arms)), draws=400)
    model = {
        "name": "build/other",
        "sha256": "1" * 64,
        "trained_by": "python jobs/train_embedded.py --seed 9",
    }
    about = {"model": model, "command": "python jobs/evaluate.py"}
    counts = {"commit": "ghi", "items": 120, "pictures": 40}
    beside = {**about, **counts, "arms": other["arms"], "differences": other["differences"]}
    text = page({**record, "beside": [beside]}, {})
    # Random is behind in both, the thumbnail in one and ahead in the other; the grid is ahead in one alone.
    assert "1 are the same; `thumbnail at 0.2` are not. 1 more" in text
    assert "    python jobs/train_embedded.py --seed 9\n" in text
    assert "| grid | 100.0 (**+25.0 [" in text
    assert "| hired | 75.0 |" in text


def test_other_pages_of_the_folder_are_linked(record: dict[str, Any]) -> None:
    assert "[restoring.md](restoring.md)" in page(record, {}, ["restoring.md"])
    assert "## More" not in page(record, {})


def test_policies_that_cannot_use_their_budget_are_named(record: dict[str, Any]) -> None:
    assert "`grid` at 20 % uses 75 % of its budget" in page(record, {})


def test_every_arm_and_task_stands_in_the_table(record: dict[str, Any]) -> None:
    text = page(record, {})
    assert "| policy | tokens | reading | presence | mean |" in text
    assert "| hired | 20 + 5 | 75.0 [" in text
    assert "| keep-all | 100 + 10 | 100.0 [100.0, 100.0]" in text
    assert "cdpruner, which needs a text tower" in text
    assert "Theirs, not measured here" in text


def test_every_picture_is_drawn_and_shown(record: dict[str, Any], tmp_path: Any) -> None:
    arms = {key: value for key, value in ARMS.items() if key[0] in ("keep-all", "hired")}
    alphas = {(f"alpha {tenth / 10}", 0.2): ARMS["random", 0.2] for tenth in (0, 10)}
    whole = copy.deepcopy(record) | {
        "ablations": figures.ablations(Answers.of(rows(arms | alphas)), 0.2, draws=50),
        "fastv": figures.in_language(fastv_rows(), rows(), num_layers=4, draws=50),
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
    assert len(drawn) == 8  # but for the ablations, which are alphas alone here
    text = page(whole, drawn)
    for name in drawn.values():
        assert (tmp_path / name).stat().st_size > 2000
        assert f"]({name})" in text
    assert "| fastv K=1 | 20 % | 44 | 100.0 [100.0, 100.0] | **+25.0 [" in text
    assert "The best alpha here is 0.5" in text
    assert "| here, top 10 % | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 |" in text
    assert "top 20 % hold 50 %" in text


def test_speeds_are_shown_of_arms_that_both_records_have(record: dict[str, Any]) -> None:
    assert [(name, rate) for name, rate, _ in speeds(record)] == [("keep-all", 3.0), ("hired 20 %", 7.0)]
    assert speeds({**record, "speed": None}) == []
