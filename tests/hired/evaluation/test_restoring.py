"""Giving dropped tokens back: what a group is, what its gain is, and what the page says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import hired
from hired import policies
from hired.evaluation import restoring, restoring_page
from hired.evaluation.likelihood import log_likelihoods
from hired.evaluation.restoring import NEEDED, Group, Question, Restored, Restoring
from hired.types import VisualTokens
from tests.hired.evaluation.test_likelihood import PROMPT, picture
from tests.tiny import tiny_llava_next

BUDGET = hired.Budget(rate=0.3)
PER_SIDE = 4


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> hired.VLM:
    return hired.load(tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), seed=1), dtype="float32")


@pytest.fixture(scope="module")
def seen(vlm: hired.VLM) -> tuple[VisualTokens, VisualTokens]:
    """All tokens of a padded picture, and those that HiRED keeps."""
    cut = [vlm.partition(picture(3))]
    [everything] = vlm.encode(cut, budget=hired.Budget(rate=1.0), policy="keep-all")
    [kept] = vlm.encode(cut, budget=BUDGET)
    return everything, kept


def places(tokens: VisualTokens) -> list[tuple[int, int]]:
    return list(zip(tokens.partition.tolist(), tokens.patch.tolist(), strict=True))


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_groups_hold_every_dropped_token_once_with_its_neighbours(
    seen: tuple[VisualTokens, VisualTokens], block: int
) -> None:
    everything, kept = seen
    groups = list(restoring.neighbourhoods(everything, kept, PER_SIDE, block))
    given_back = [places(everything)[index] for group in groups for index in group.tolist()]
    assert sorted(given_back) == sorted(set(places(everything)) - set(places(kept)))
    blocks = [
        {
            (p, j // PER_SIDE // block, j % PER_SIDE // block)
            for p, j in (places(everything)[i] for i in group)
        }
        for group in groups
    ]
    assert all(len(block) == 1 for block in blocks)
    assert len(set.union(*blocks)) == len(blocks)


def test_with_every_group_given_back_all_is_as_it_was(seen: tuple[VisualTokens, VisualTokens]) -> None:
    everything, tokens = seen
    for group in restoring.neighbourhoods(everything, tokens, PER_SIDE, 2):
        tokens = restoring.joined(tokens, everything, group)
        assert places(tokens) == sorted(places(tokens))
    assert places(tokens) == places(everything)
    assert tokens.features.equal(everything.features)


def test_gains_are_differences_of_likelihoods(
    vlm: hired.VLM, seen: tuple[VisualTokens, VisualTokens]
) -> None:
    everything, kept = seen
    question = Question("k", "read", "p", vlm.partition(picture(3)), PROMPT, "a fox")
    [found] = restoring.restore(
        vlm, [question], budget=BUDGET, policy=policies.get("hired"), block=2
    ).questions

    def log_likelihood(tokens: VisualTokens) -> float:
        [each] = log_likelihoods(vlm, [tokens], PROMPT, "a fox")
        return float(each.sum())

    assert found.with_kept == pytest.approx(log_likelihood(kept), abs=1e-4)
    assert found.with_all == pytest.approx(log_likelihood(everything), abs=1e-4)
    assert found.loss == pytest.approx(log_likelihood(everything) - log_likelihood(kept), abs=1e-4)
    groups = list(restoring.neighbourhoods(everything, kept, PER_SIDE, 2))
    [attention] = vlm.encoder.cls_attention([question.partitions], layers=[2])
    assert len(found.groups) == len(groups) > 10
    for told, group in list(zip(found.groups, groups, strict=True))[::5]:
        gain = log_likelihood(restoring.joined(kept, everything, group)) - log_likelihood(kept)
        assert told.gain == pytest.approx(gain, abs=1e-4)
        scores = [float(attention[2][p, j]) for p, j in (places(everything)[i] for i in group)]
        assert told.scores[2] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
        assert told.num_tokens == len(group)


def test_an_unknown_answer_is_that_of_all_tokens(vlm: hired.VLM) -> None:
    cut = vlm.partition(picture(0))
    everything = vlm.encode([cut], budget=hired.Budget(rate=1.0), policy="keep-all")
    [caption] = vlm.generate(everything, PROMPT, max_new_tokens=5)
    [expected] = log_likelihoods(vlm, everything, PROMPT, caption)
    [found] = restoring.restore(
        vlm,
        [Question("k", "all", "p", cut, PROMPT)],
        budget=BUDGET,
        policy=policies.get("hired"),
        max_new_tokens=5,
    ).questions
    assert found.with_all == pytest.approx(float(expected.sum()), abs=1e-4)


def test_distance_is_to_the_nearest_kept_token_of_the_partition() -> None:
    def tokens(*places: tuple[int, int]) -> VisualTokens:
        partition, patch = torch.tensor(places).unbind(-1)
        grid, size = hired.Grid(1, 1), hired.types.Size(8, 8)
        return VisualTokens(torch.zeros(len(places), 1), partition, patch, grid, size, 32)

    everything = tokens((0, 0), (0, 1), (0, 15), (1, 3))
    kept = tokens((0, 15))
    distance = restoring._distance
    assert distance(everything, kept, torch.tensor([0, 1]), PER_SIDE) == pytest.approx(math.hypot(3, 2.5))
    assert distance(everything, kept, torch.tensor([3]), PER_SIDE) == math.inf


def restored(*gains: float, loss: float = 0.0, task: str = "read", picture: str = "p") -> Restored:
    """Groups whose scores rise from one to the next."""
    groups = tuple(Group(1, 9, 1.0, {0: -float(i), 4: float(i)}, gain) for i, gain in enumerate(gains))
    return Restored("k", task, picture, -loss, 0.0, groups)


def result(*questions: Restored) -> Restoring:
    return Restoring("hired", BUDGET, 3, (0, 4), questions)


class TestResult:
    def test_a_score_that_orders_the_gains_correlates_fully(self) -> None:
        found = result(restored(0.1, 0.2, 0.7), restored(-1.0, 0.0, 0.5, 3.0, picture="q"))
        for layer, rho in ((4, 1.0), (0, -1.0)):
            interval = found.correlation(layer)
            assert interval is not None
            assert (interval.low, interval.measured, interval.high) == pytest.approx((rho, rho, rho))

    def test_questions_without_an_order_are_left_out_of_the_correlation(self) -> None:
        assert result(restored(0.1, 0.2), restored(1.0, 1.0, 1.0)).correlation(4) is None

    def test_needed_and_misleading_groups_are_counted_alike(self) -> None:
        found = result(restored(NEEDED, 0.0), restored(-NEEDED, 0.1), restored(0.6, -0.6), restored())
        assert found.share(lambda question: question.largest_gain >= NEEDED).measured == 0.25
        assert found.share(lambda question: question.largest_harm >= NEEDED).measured == 0.25

    def test_hurt_questions_are_those_whose_answer_became_half_as_likely(self) -> None:
        hurt, fine = restored(loss=NEEDED), restored(loss=0.5)
        assert result(hurt, fine).hurt.questions == (hurt,)

    def test_tenths_of_the_score_are_those_of_each_question(self) -> None:
        needed, misleading = restoring_page.by_score(
            result(restored(*[0.0] * 18, 1.0, 1.0), restored(-1.0, *[0.0] * 9)), 4
        )
        assert needed.tolist() == pytest.approx([0] * 9 + [200 / 3])
        assert misleading.tolist() == pytest.approx([100 / 3] + [0] * 9)


def test_the_page_and_its_picture_say_what_was_found(tmp_path: Path) -> None:
    far = replace(restored(0.0, 1.0, loss=2.0, task="chart").groups[1], distance=math.inf, partition=0)
    found = result(
        restored(0.0, 0.1, 1.0, loss=1.0), Restored("k", "chart", "q", -2.0, 0.0, (far,)), restored()
    )
    page = restoring_page.page([found], command="python x", model="m", picture="restoring.png")
    assert "| 30 % | all | 3 | 67 % (" in page
    assert "| 30 % | chart | 1 | 100 % (100 to 100) | 100 % (100 to 100) | 0 % (0 to 0) |" in page
    assert "| 30 % | CLS attention of layer 4 | +1.000 (+1.000 to +1.000) | +1.000" in page
    assert "| 30 % | in a partition that keeps nothing | 1 | 100.00 % | 0.00 % | +1.0000 |" in page
    assert "| 30 % | 4 or more patches from a kept token | 0 |" in page
    restoring_page.plot([found, found], tmp_path / "restoring.png")
    assert Image.open(tmp_path / "restoring.png").width > 400
