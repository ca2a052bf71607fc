"""Answers of many arms after one look: the same as if each question were asked alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import hired
from hired import policies
from hired.budget import Budget
from hired.engine import EngineOptions
from hired.engine.continuous import MAX_PREFIXES
from hired.errors import ConfigurationError, GenerationError
from hired.evaluation.answering import Respondent
from hired.evaluation.arms import Arm
from hired.evaluation.items import Item, Picture
from hired.evaluation.tasks import draw
from hired.types import Partitions
from hired.vlm import VLM
from tests.tiny import tiny_llava_next

ARMS = [
    Arm("keep-all", policies.get("keep-all"), Budget(rate=1.0)),
    Arm("hired", policies.get("hired"), Budget(rate=0.3)),
    Arm("hired", policies.get("hired"), Budget(rate=0.1)),
    Arm("compact", policies.get("hired"), Budget(rate=0.3), positions="compact"),
    Arm("no newlines", policies.get("hired"), Budget(rate=0.3), newlines="none"),
    Arm("pool", policies.get("pool"), Budget(tokens=8)),
    Arm("random", policies.get("random"), Budget(rate=0.5)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return hired.load(folder, device="cpu", engine=EngineOptions(kv_cache_bytes=2**24))


@pytest.fixture(scope="module")
def asked(vlm: VLM) -> list[tuple[Partitions, tuple[Item, ...]]]:
    return [(vlm.partition(picture.data), limited(picture)) for picture in draw(3, seed=5)]


def limited(picture: Picture) -> tuple[Item, ...]:
    """Some of its items; a caption first and last would hide an order that is wrong."""
    items = sorted(picture.items, key=lambda item: item.task != "counting")[:5]
    return tuple(
        Item(i.key, i.task, i.picture, i.question, i.answers, i.metric, 4 + 3 * n)
        for n, i in enumerate(items)
    )


def test_every_answer_is_what_the_model_says_when_nothing_is_shared(
    vlm: VLM, asked: list[tuple[Partitions, Sequence[Item]]], folder: Path
) -> None:
    assert len(ARMS) * len(asked) > MAX_PREFIXES  # more than one wave
    answers = Respondent(vlm.encoder, vlm.generator).answers(asked, ARMS)
    assert [(answer.arm, answer.item.key) for answer in answers] == [
        (arm, item.key) for arm in ARMS for _, items in asked for item in items
    ]
    partitions = {item.picture: image for image, items in asked for item in items}
    other = hired.load(folder, device="cpu", engine=EngineOptions(name="transformers"))
    for arm in ARMS:
        own = [answer for answer in answers if answer.arm is arm]
        tokens = [
            vlm.encode([partitions[answer.item.picture]], budget=arm.budget, policy=arm.policy)[0]
            for answer in own
        ]
        expected = other.generator.packing(arm.newlines, arm.positions).generate(
            tokens,
            [answer.item.question for answer in own],
            max_new_tokens=[answer.item.max_new_tokens for answer in own],
        )
        for answer, caption, kept in zip(own, expected, tokens, strict=True):
            assert not isinstance(caption, GenerationError)
            assert answer.text == caption.text
            assert answer.num_tokens == len(kept)
            assert answer.num_tokens + answer.num_newlines == caption.visual_tokens_kept
    assert len({answer.text for answer in answers}) > len(answers) / 4  # the questions and arms matter


def test_an_engine_without_prefixes_gives_the_same_answers(
    vlm: VLM, asked: list[tuple[Partitions, Sequence[Item]]], folder: Path
) -> None:
    other = hired.load(folder, device="cpu", engine=EngineOptions(name="transformers"))
    some, arms = asked[:1], ARMS[:2]
    ours = Respondent(vlm.encoder, vlm.generator).answers(some, arms)
    theirs = Respondent(other.encoder, other.generator).answers(some, arms)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]


def test_a_picture_about_which_nothing_is_asked_costs_nothing(
    vlm: VLM, asked: list[tuple[Partitions, Sequence[Item]]]
) -> None:
    (first, items), (second, _) = asked[:2]
    answers = Respondent(vlm.encoder, vlm.generator).answers([(second, ()), (first, items)], ARMS[:1])
    assert [answer.item for answer in answers] == list(items)


@pytest.mark.parametrize("place", [0, 1])
def test_a_question_that_cannot_be_asked_is_an_error_and_no_empty_answer(
    vlm: VLM, asked: list[tuple[Partitions, Sequence[Item]]], place: int
) -> None:
    image, items = asked[0]
    bad = Item("bad", "t", items[0].picture, "What is <image>?", ("x",), "exact", 20 if place == 0 else 1)
    with pytest.raises(GenerationError):
        Respondent(vlm.encoder, vlm.generator).answers([(image, (*items[:2], bad))], ARMS[:1])
    # The engine is none the worse for it.
    assert Respondent(vlm.encoder, vlm.generator).answers([(image, items[:2])], ARMS[:1])


def test_an_arm_is_checked_when_it_is_made() -> None:
    policy, budget = policies.get("hired"), Budget(rate=0.5)
    with pytest.raises(ConfigurationError, match="needs a name"):
        Arm("", policy, budget)
    with pytest.raises(ConfigurationError, match=r"newlines='some'.*rows, all, none"):
        Arm("x", policy, budget, newlines="some")  # type: ignore[arg-type]
