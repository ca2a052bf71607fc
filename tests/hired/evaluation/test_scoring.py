"""Scores by the name of a metric."""

from __future__ import annotations

import pytest

from hired.errors import ConfigurationError
from hired.evaluation.scoring import METRICS, score

TRUE = "a chart of 3 bars at top left, a red sign saying HAT at top right, a blue ring at bottom left."


@pytest.mark.parametrize(
    ("metric", "answer", "answers", "expected"),
    [
        ("exact", "A red circle.", ["a red circle"], 1.0),
        ("exact", "a red", ["a red circle"], 0.0),
        ("relaxed", "41", ["40"], 1.0),
        ("relaxed", "43", ["40"], 0.0),
        ("relaxed", "43", ["40", "43"], 1.0),
        ("pope", "Yes.", ["yes"], 1.0),
        ("pope", "Yes, there is", ["yes"], 0.0),
        ("mme", "Yes, there is", ["yes"], 1.0),
        ("vqa", "red", ["red"] * 10, 1.0),
        ("vqa", "red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("textvqa", "HAT", ["hat"] * 10, 1.0),
        ("anls", "HOTEL", ["HOTELS"], 5 / 6),
        ("ocrbench", "it says HAT", ["hat"], 1.0),
        ("scienceqa", "B.", ["B"], 1.0),
    ],
)
def test_each_metric_is_the_benchmarks(metric: str, answer: str, answers: list[str], expected: float) -> None:
    assert score(metric, answer, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (TRUE, 1.0),
        # Places do not count, and neither does the order.
        ("a blue ring at top left, a chart of 3 bars at center, a red sign saying HAT at center", 1.0),
        # Three of four found, nothing made up: precision 1, recall 3/4.
        ("a chart of 3 bars at top left, a red sign saying HUT at top right", 2 * 2 / (3 + 4)),
        # Saying a thing twice finds it once.
        ("a blue ring at top left, a blue ring at top right", 2 * 1 / (2 + 4)),
        ("", 0.0),
    ],
)
def test_a_caption_is_scored_by_the_objects_and_words_that_it_finds(caption: str, expected: float) -> None:
    assert score("contents", caption, [TRUE]) == pytest.approx(expected)


def test_an_unknown_metric_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'bleu'.*anls"):
        score("bleu", "a", ["a"])
    assert len(METRICS) == 10
