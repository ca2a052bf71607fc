"""The eight benchmarks' metrics on examples worked by hand."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hired.evaluation.metrics import (
    MmeAnswer,
    anls,
    edit_distance,
    mme_scores,
    normalised,
    ocrbench_accuracy,
    ocrbench_score,
    pope_scores,
    relaxed_accuracy,
    scienceqa_accuracy,
    textvqa_accuracy,
    textvqa_question,
    vqa_accuracy,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A red Car.", "red car"),
        ("the Two dogs", "2 dogs"),
        ("none", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("v2.0.", "v2.0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("John's car", "john 's car"),
        ("t-shirt", "t shirt"),
        ("left - right", "left right"),
        ("(left)", "left"),
        ("yes, it is?", "yes it is"),
        ("on\nthe\ttable", "on table"),
        ("  what!  ", "what"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_evalai_does(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_every_sign_goes_where_a_number_has_a_comma() -> None:
    """In an annotator's answer, which keeps its commas."""
    assert vqa_accuracy("1000 kmh", ["1,000 km/h", "1000 kmh", "1000kmh", "a", "b"]) == pytest.approx(
        (1 / 3 + 1 / 3 + 3 * 2 / 3) / 5
    )


class TestVqa:
    def test_three_others_are_enough(self) -> None:
        """Of ten annotators four say so: for those four three others do, for the six others all four."""
        assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1.0

    def test_fewer_give_their_thirds(self) -> None:
        # The three who said it have two others each, the seven who did not have three.
        assert vqa_accuracy("Red.", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
        assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 * (1 / 3) / 10)
        assert vqa_accuracy("green", ["red"] * 10) == 0.0

    def test_answers_are_normalised_only_where_annotators_disagree(self) -> None:
        assert vqa_accuracy("2 dogs", ["two dogs"] * 9 + ["dogs"]) == pytest.approx(1.0)
        assert vqa_accuracy("2 dogs", ["two dogs"] * 10) == 0.0
        assert vqa_accuracy("dogs", ["dogs\n"] * 10) == 1.0

    def test_textvqa_normalises_all_answers_wholly(self) -> None:
        assert textvqa_accuracy("two dogs", ["Two dogs?"] * 10) == 1.0
        assert textvqa_accuracy("nokia", ["Nokia"] * 3 + ["the nokia"] + ["phone"] * 6) == 1.0
        assert textvqa_accuracy("john's", ["John's"] * 2 + ["x"] * 8) == pytest.approx(
            (2 * 1 / 3 + 8 * 2 / 3) / 10
        )

    def test_annotators_answers_to_vqav2_are_not_tokenised(self) -> None:
        """``'s`` is parted from the prediction alone, so the two do not meet."""
        answers = ["john's"] * 9 + ["x"]
        assert vqa_accuracy("john's", answers) == 0.0
        assert textvqa_accuracy("john's", answers) == 1.0

    def test_textvqas_questions_are_capitalised(self) -> None:
        assert textvqa_question("what does the Sign say?") == "What does the sign say?"


class TestAnls:
    @pytest.mark.parametrize(
        ("prediction", "answers", "expected"),
        [
            ("Hello  World", ["hello world"], 1.0),
            ("hello wrld", ["hello world"], 1 - 1 / 11),
            ("abcd", ["ab"], 0.5),  # the threshold itself counts
            ("abcde", ["ab"], 0.0),  # 0.4
            ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
            ("", [""], 1.0),
            ("", ["a"], 0.0),
        ],
    )
    def test_worked_examples(self, prediction: str, answers: list[str], expected: float) -> None:
        assert anls(prediction, answers) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("one", "other", "distance"),
        [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("same", "same", 0), ("ab", "ba", 2)],
    )
    def test_edit_distances(self, one: str, other: str, distance: int) -> None:
        assert edit_distance(one, other) == edit_distance(other, one) == distance

    @given(*[st.text("ab c", max_size=8)] * 3)
    def test_the_edit_distance_is_one(self, one: str, other: str, third: str) -> None:
        assert (edit_distance(one, other) == 0) == (one == other)
        assert edit_distance(one, third) <= edit_distance(one, other) + edit_distance(other, third)
        assert abs(len(one) - len(other)) <= edit_distance(one, other) <= max(len(one), len(other))


class TestChartQa:
    @pytest.mark.parametrize(
        ("prediction", "target", "right"),
        [
            ("105", "100", True),
            ("95", "100", True),
            ("105.1", "100", False),
            ("-96", "-100", True),
            ("50%", "0.5", True),
            ("52%", "50%", True),
            ("50", "50%", False),
            ("0", "0", True),  # a target of 0 is text
            ("0.0", "0", False),
            ("Yes", "yes", True),
            ("red ", "red", False),
            ("1,000", "1000", False),
            ("ten", "10", False),
            ("%", "%", True),
        ],
    )
    def test_worked_examples(self, prediction: str, target: str, right: bool) -> None:
        assert relaxed_accuracy(prediction, target) == float(right)


class TestOcrBench:
    def test_an_answer_in_the_prediction_is_right_whatever_the_case(self) -> None:
        assert ocrbench_accuracy("The sign says STOP.", ["stop", "halt"]) == 1.0
        assert ocrbench_accuracy("two\nlines", ["Two lines"]) == 1.0
        assert ocrbench_accuracy("st op", ["stop"]) == 0.0

    def test_formulas_are_compared_without_spaces_and_with_case(self) -> None:
        assert ocrbench_accuracy("x ^ { 2 } + Y", ["x^{2}+Y"], formula=True) == 1.0
        assert ocrbench_accuracy("x ^ { 2 } + y", ["x^{2}+Y"], formula=True) == 0.0

    def test_the_score_is_of_a_thousand(self) -> None:
        assert ocrbench_score([1.0] * 501 + [0.0] * 499) == pytest.approx(0.501)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("B", True), ("B. the moon", True), ("B.", True), ("b", False), ("B the moon", False), ("A. B.", False)],
)
def test_scienceqa_wants_the_letter(prediction: str, right: bool) -> None:
    assert scienceqa_accuracy(prediction, "B") == float(right)


class TestMme:
    @pytest.mark.parametrize(
        ("prediction", "said"),
        [
            ("Yes", "yes"),
            ("No.", "no"),
            ("y", "yes"),
            ("N", "no"),
            ("Yes, there is", "yes"),
            ("No, none", "no"),
            ("It is not", "other"),  # "it i"
            ("maybe", "other"),
            ("know", "no"),
            ("", "other"),
            ("x", "other"),
            (" yes ", "yes"),
        ],
    )
    def test_the_first_four_characters_speak(self, prediction: str, said: str) -> None:
        assert yes_or_no(prediction) == said

    def test_accuracy_and_accuracy_plus_are_added_and_averaged_over_images(self) -> None:
        answers = [
            MmeAnswer("count", "a", True), MmeAnswer("count", "a", True),
            MmeAnswer("count", "b", True), MmeAnswer("count", "b", False),
            MmeAnswer("color", "a", False), MmeAnswer("color", "a", False),
        ]  # fmt: skip
        assert mme_scores(answers) == {"count": (200 + 50) / 2, "color": 0.0}

    def test_an_image_with_one_answer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'a' has 1 answers"):
            mme_scores([MmeAnswer("count", "a", True)])


class TestPope:
    def test_worked_example(self) -> None:
        predictions = ["yes", "Yes.", "no", "no", "yes", "No.", "no", "it is"]
        truths: list[Literal["yes", "no"]] = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
        scores = pope_scores(predictions, truths)
        assert (scores.precision, scores.accuracy, scores.yes_share) == (2 / 3, 5 / 8, 3 / 8)
        assert scores.recall == 2 / 3  # the answer that is neither is left out
        assert scores.f1 == pytest.approx(2 / 3)

    def test_nobody_who_says_yes_has_no_precision(self) -> None:
        scores = pope_scores(["no", "no"], ["yes", "no"])
        assert (scores.f1, scores.precision, scores.recall, scores.accuracy) == (0, 0, 0, 0.5)

    def test_no_answers_have_no_score(self) -> None:
        with pytest.raises(ValueError, match="without answers"):
            pope_scores([], [])
