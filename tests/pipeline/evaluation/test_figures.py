"""From rows to figures, on rows whose figures are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from hired.errors import ConfigurationError
from pipeline.evaluation import figures
from pipeline.evaluation.asking import SCHEMA
from pipeline.evaluation.figures import Answers

NUM_PICTURES = 40
TASKS = {"reading": 2, "presence": 1}
Score = Callable[[str, int, int], float]

# By arm: the score of a question of a task about a picture, and the tokens of a picture.
ARMS: dict[tuple[str, float], tuple[Score, int, int]] = {
    ("keep-all", 1.0): (lambda task, picture, number: 1.0, 100, 10),
    ("full-image", 1.0): (lambda task, picture, number: float(task == "presence"), 30, 0),
    ("hired", 0.2): (lambda task, picture, number: float(picture % 4 > 0), 20, 5),
    ("thumbnail", 0.2): (lambda task, picture, number: float(task == "presence"), 20, 0),
    ("random", 0.2): (lambda task, picture, number: float(picture % 2), 20, 8),
    ("random#1", 0.2): (lambda task, picture, number: float(picture % 2 == 0), 20, 8),
    ("grid", 0.2): (lambda task, picture, number: float(picture % 4 > 0), 15, 6),
}


def rows(arms: dict[tuple[str, float], tuple[Score, int, int]] = ARMS) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "key": f"{picture}-{task}-{number}",
                "task": task,
                "picture": str(picture),
                "arm": name,
                "rate": rate,
                "answer": "x",
                "score": score(task, picture, number),
                "tokens": tokens,
                "newlines": newlines,
            }
            for picture in range(NUM_PICTURES)
            for (name, rate), (score, tokens, newlines) in arms.items()
            for task, count in TASKS.items()
            for number in range(count)
        ],
        SCHEMA,
    )


@pytest.fixture(scope="module")
def record() -> dict[str, object]:
    return figures.table(Answers.of(rows()), draws=400)


def arm(record: dict, name: str) -> dict:
    return record["arms"][name]


def test_every_task_and_arm_has_its_mean_between_the_ends_of_its_interval(record: dict) -> None:
    assert record["tasks"]["reading"] == {
        "items": 2 * NUM_PICTURES,
        "pictures": NUM_PICTURES,
        "answered_by_full_image": 0,
    }
    assert record["tasks"]["presence"]["answered_by_full_image"] == NUM_PICTURES
    measured, low, high = arm(record, "hired at 0.2")["tasks"]["reading"]
    assert measured == 0.75
    # Forty pictures with p = 3/4: a standard error of 0.068.
    assert low == pytest.approx(0.75 - 1.96 * 0.068, abs=0.03)
    assert high == pytest.approx(0.75 + 1.96 * 0.068, abs=0.03)
    assert arm(record, "keep-all at 1")["mean"] == (1.0, 1.0, 1.0)


def test_tasks_weigh_alike_whatever_the_number_of_their_items(record: dict) -> None:
    assert arm(record, "thumbnail at 0.2")["mean"][0] == 0.5


def test_seeds_of_one_policy_are_one_arm(record: dict) -> None:
    assert "random#1 at 0.2" not in record["arms"]
    # One seed answers the odd pictures and one the even ones, so each item's mean is a half.
    assert arm(record, "random at 0.2")["mean"] == (0.5, 0.5, 0.5)


def test_items_that_the_full_image_answers_are_left_out_in_the_second_figures(record: dict) -> None:
    cell = arm(record, "thumbnail at 0.2")
    assert set(cell["tasks_without_easy"]) == {"reading"}
    assert cell["mean_without_easy"][0] == 0.0
    assert arm(record, "hired at 0.2")["mean_without_easy"][0] == 0.75


def test_differences_are_of_the_same_pictures(record: dict) -> None:
    differences = record["differences"]
    assert set(differences) == {"thumbnail at 0.2", "random at 0.2", "grid at 0.2"}
    # Equal on every picture: the interval is a point, however wide each one's own is.
    assert differences["grid at 0.2"]["mean"] == (0.0, 0.0, 0.0)
    measured, low, high = differences["thumbnail at 0.2"]["tasks"]["reading"]
    assert measured == -0.75
    assert low < measured < high < 0
    assert figures.excludes_zero((measured, low, high))


def test_tokens_are_counted_by_picture_and_against_the_budget(record: dict) -> None:
    cell = arm(record, "grid at 0.2")
    assert (cell["tokens"], cell["newlines"], cell["fewest"], cell["most"]) == (15, 6, 15, 15)
    assert cell["budget_used"] == 0.75
    assert arm(record, "hired at 0.2")["budget_used"] == 1.0


def test_a_run_that_is_not_complete_has_no_figures() -> None:
    whole = rows()
    with pytest.raises(ConfigurationError, match="not answered every item"):
        Answers.of(whole.slice(0, whole.num_rows - 1))


def test_rows_may_come_in_any_order() -> None:
    whole = rows()
    shuffled = whole.take(pa.array(np.random.default_rng(0).permutation(whole.num_rows)))
    one, other = (figures.table(Answers.of(table), draws=50) for table in (whole, shuffled))
    for name, cell in one["arms"].items():
        assert other["arms"][name]["mean"][0] == pytest.approx(cell["mean"][0])


def fastv_rows() -> pa.Table:
    """FastV on half of the pictures, with 22 of 110 tokens above its first layer."""
    arms = {("fastv K=1", 0.2): (lambda task, picture, number: 1.0, 22, 0)}
    table = rows(arms)
    return table.filter([int(picture) < NUM_PICTURES // 2 for picture in table["picture"].to_pylist()])


def test_fastv_stands_beside_answers_about_the_same_pictures() -> None:
    section = figures.in_language(fastv_rows(), rows(), num_layers=4, draws=100)
    assert (section["items"], section["pictures"]) == (3 * NUM_PICTURES // 2, NUM_PICTURES // 2)
    assert set(section["arms"]) == {"keep-all at 1", "hired at 0.2", "fastv K=1 at 0.2"}
    assert section["differences"]["fastv K=1 at 0.2"]["mean"][0] == 0.25


def test_fastvs_cost_counts_the_layers_that_see_everything() -> None:
    arms = figures.in_language(fastv_rows(), rows(), num_layers=4, draws=10)["arms"]
    assert arms["keep-all at 1"]["tokens_a_layer"] == 110
    assert arms["hired at 0.2"]["tokens_a_layer"] == 25
    assert arms["fastv K=1 at 0.2"]["tokens_a_layer"] == (110 + 3 * 22) / 4


def test_ablations_are_held_against_hired() -> None:
    arms = {key: value for key, value in ARMS.items() if key[0] in ("keep-all", "hired")} | {
        ("alpha 0.0", 0.2): ARMS["random", 0.2]
    }
    section = figures.ablations(Answers.of(rows(arms)), 0.2, draws=200)
    assert set(section["differences"]) == {"alpha 0.0 at 0.2"}
    assert section["differences"]["alpha 0.0 at 0.2"]["mean"][0] == pytest.approx(-0.25)
    assert (section["items"], section["pictures"]) == (3 * NUM_PICTURES, NUM_PICTURES)
