"""Captions at a budget against those with all tokens."""

from __future__ import annotations

import math

import pytest

import hired
from hired import policies
from hired.errors import ConfigurationError
from hired.evaluation.fidelity import (
    AtBudget,
    Compared,
    Fidelity,
    Refused,
    fidelity,
    page,
    token_f1,
)
from hired.evaluation.likelihood import log_likelihoods
from tests.hired.evaluation.test_likelihood import SIZES, picture
from tests.pictures import saved
from tests.tiny import tiny_llava_next

PROMPT = "Describe the picture."
BUDGETS = [hired.Budget(rate=0.1), hired.Budget(rate=1.0), hired.Budget(tokens=20)]
IMAGES = [(f"{number}.png", picture(number)) for number in range(len(SIZES))]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> hired.VLM:
    return hired.load(tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), seed=1), dtype="float32")


@pytest.fixture(scope="module")
def result(vlm: hired.VLM) -> Fidelity:
    broken = [("broken.jpg", b"no picture"), ("gone.jpg", Refused("gone.jpg", "it is not there"))]
    return fidelity(vlm, [*IMAGES, *broken], PROMPT, BUDGETS, policies.get("hired"), max_new_tokens=8)


def test_all_tokens_change_nothing_and_fewer_do(result: Fidelity) -> None:
    assert [at.budget for at in result.budgets] == [BUDGETS[1], BUDGETS[2], BUDGETS[0]]
    everything, *_, fewest = result.budgets
    assert all(image.is_exact and image.f1 == 1 for image in everything.images)
    assert [image.change for image in everything.images] == pytest.approx([0] * len(SIZES), abs=1e-5)
    assert not any(image.is_exact for image in fewest.images)
    assert all(abs(image.change) > 0.01 for image in fewest.images)


def test_likelihoods_are_those_of_keep_alls_caption(vlm: hired.VLM, result: Fidelity) -> None:
    cut = [vlm.partition(image) for _, image in IMAGES]
    everything = vlm.encode(cut, budget=hired.Budget(rate=1.0), policy="keep-all")
    captions = vlm.generate(everything, PROMPT, max_new_tokens=8)
    before = log_likelihoods(vlm, everything, PROMPT, captions)
    after = log_likelihoods(vlm, vlm.encode(cut, budget=BUDGETS[0]), PROMPT, captions)
    for image, caption, then, now in zip(result.budgets[-1].images, captions, before, after, strict=True):
        assert image.keep_all_caption == caption.text
        assert image.log_likelihood == pytest.approx(float(now.mean()), abs=1e-5)
        assert image.change == pytest.approx(float(now.mean() - then.mean()), abs=1e-5)


def test_images_that_cannot_be_used_are_named_with_the_reason(result: Fidelity) -> None:
    assert [each.name for each in result.refused] == ["broken.jpg", "gone.jpg"]
    assert [image.name for image in result.budgets[0].images] == [name for name, _ in IMAGES]
    text = page(result, command="x", model="m")
    assert "Images that took no part: 2" in text
    assert "- gone.jpg: it is not there" in text


def test_a_prompt_that_does_not_fit_refuses_the_image(vlm: hired.VLM) -> None:
    with pytest.raises(ConfigurationError, match=r"0\.png: .*context"):
        fidelity(vlm, IMAGES[:1], PROMPT * 300, BUDGETS, policies.get("hired"))


@pytest.mark.parametrize("images", [[], [("a", saved(picture(0), "PNG")[:50])]])
def test_without_an_image_there_is_nothing_to_measure(
    vlm: hired.VLM, images: list[tuple[str, bytes]]
) -> None:
    with pytest.raises(ConfigurationError, match="no image to measure"):
        fidelity(vlm, images, PROMPT, BUDGETS, policies.get("hired"))


def at(rate: float, *likelihoods_kept: float) -> AtBudget:
    images = [
        Compared(f"{i}", "a b", "a b c", int(1000 * rate), 1000, -1.0, math.log(kept))
        for i, kept in enumerate(likelihoods_kept)
    ]
    return AtBudget(hired.Budget(rate=rate), tuple(images))


def suggestion(*budgets: AtBudget, tolerance: float = 0.05) -> float | None:
    found = Fidelity("hired", PROMPT, budgets, ()).suggestion(tolerance)
    return None if found is None else found.rate


class TestSuggestion:
    def test_it_is_the_smallest_budget_within_the_tolerance(self) -> None:
        measured = at(0.6, 1.0, 1.0), at(0.4, 0.97, 0.96), at(0.2, 0.9, 0.9)
        assert suggestion(*measured) == 0.4
        assert suggestion(*measured, tolerance=0.11) == 0.2
        assert suggestion(*measured, tolerance=0.01) == 0.6
        assert "**0.4**" in page(Fidelity("hired", PROMPT, measured, ()), command="x", model="m")

    def test_the_lower_end_of_the_interval_decides(self) -> None:
        assert math.exp(at(0.4, 1.0, 1.0, 1.0, 0.85).change.measured) > 0.95
        assert suggestion(at(0.4, 1.0, 1.0, 1.0, 0.85)) is None

    def test_a_budget_below_one_that_fails_is_not_trusted(self) -> None:
        assert suggestion(at(0.6, 0.99, 0.99), at(0.4, 0.8, 0.8), at(0.2, 0.99, 0.99)) == 0.6

    def test_none_fits_is_said(self) -> None:
        text = page(Fidelity("hired", PROMPT, (at(0.2, 0.5, 0.5),), ()), command="x", model="m")
        assert "No budget measured here" in text
        assert "| 0.2 | 200 | 0 % (0 to 0) | 0.800 (0.800 to 0.800) | 50.0 % (50.0 to 50.0) |" in text


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("A red sign.", "a RED sign", 1.0),
        ("", "...", 1.0),
        ("a", "", 0.0),
        ("a red red sign", "red sign", 2 * 2 / 6),
        ("sign red a", "a red sign", 1.0),
    ],
)
def test_f1_counts_words_in_common(one: str, other: str, expected: float) -> None:
    assert token_f1(one, other) == pytest.approx(expected)
    assert token_f1(other, one) == pytest.approx(expected)
