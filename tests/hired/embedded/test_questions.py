"""Questions have one right answer, which the scene itself bears out."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hired.embedded import painter
from hired.embedded.questions import Question, ask, describe
from hired.embedded.tokenisation import build_tokenizer

SCENES = [
    painter.paint(random.Random(seed), painter.PINPOINTS[seed % 5], brush_type=painter.LabelBrush)
    for seed in range(60)
]


def asked(task: str) -> list[tuple[painter.Scene, Question]]:
    return [
        (scene, question)
        for seed, scene in enumerate(SCENES)
        for question in ask(scene, random.Random(seed))
        if question.task == task
    ]


def test_every_task_is_asked() -> None:
    tasks = {question.task for scene in SCENES for question in ask(scene, random.Random(0))}
    assert tasks == {"describe", "read", "read-place", "place", "colour", "shape", "yes-no", "count", "chart"}


def test_no_question_of_a_scene_has_two_answers() -> None:
    for scene in SCENES:
        answers = Counter({q.text: 0 for q in ask(scene, random.Random(0))})
        for question in {(q.text, q.answer) for q in ask(scene, random.Random(0))}:
            answers[question[0]] += 1
        assert set(answers.values()) == {1}


def test_yes_means_there_and_no_means_not_there() -> None:
    answers = Counter()
    for scene, question in asked("yes-no"):
        colour, name = question.text.removeprefix("Is there a ").removesuffix("?").split()
        there = any((thing.colour, thing.name) == (colour, name) for thing in scene.of_kind("shape"))
        assert question.answer == ("yes" if there else "no")
        answers[question.answer] += 1
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_reading_names_a_sign_by_a_colour_or_place_that_no_other_sign_has() -> None:
    for scene, question in asked("read") + asked("read-place"):
        signs = [
            s for s in scene.of_kind("sign") if s.colour in question.text or s.place_name in question.text
        ]
        assert [sign.text for sign in signs] == [question.answer]


def test_the_description_names_every_thing() -> None:
    for scene in SCENES:
        caption = describe(scene)
        assert caption.count(" at ") == sum(thing.kind != "bar" for thing in scene.things)
        assert all(sign.text in caption for sign in scene.of_kind("sign"))


@pytest.mark.parametrize("text", ["a red star", "GARDEN 42", "Straße, 東京 😀\n\ttabs"])
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_word_on_a_sign_is_spelt_glyph_by_glyph() -> None:
    tokenizer = build_tokenizer()
    for scene, question in asked("read"):
        assert len(tokenizer.encode(question.answer, add_special_tokens=False)) == len(question.answer), scene
    assert len(tokenizer.encode(" purple", add_special_tokens=False)) == 1
