"""The next token: greedy, or drawn as its probabilities say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hired.engine import GREEDY, Sampling
from hired.engine.sampling import choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(sampling: Sampling, count: int = 4000) -> Counter[int]:
    """What each of ``count`` steps of one answer draws."""
    return Counter(choose(LOGITS.repeat(count, 1), [sampling] * count, range(count)).tolist())


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert choose(torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]), [GREEDY] * 2, [0, 0]).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_probabilities_say(temperature: float) -> None:
    found = draws(Sampling(temperature=temperature, seed=3))
    for token, probability in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        spread = (probability * (1 - probability) / 4000) ** 0.5
        assert abs(found[token] / 4000 - probability) < 4 * spread + 1e-9


@pytest.mark.parametrize(("top_p", "tokens"), [(1e-9, {4}), (0.6, {4}), (0.64, {4, 0}), (0.9, {4, 0, 1})])
def test_only_the_nucleus_is_drawn_from(top_p: float, tokens: set[int]) -> None:
    assert set(draws(Sampling(temperature=1.0, top_p=top_p))) == tokens


def test_seeds_and_steps_draw_apart_and_neighbours_do_not_matter() -> None:
    sampling = [Sampling(temperature=1.0, seed=seed) for seed in range(40)]
    together = choose(LOGITS.repeat(41, 1), [GREEDY, *sampling], [7] * 41).tolist()
    apart = [choose(LOGITS[None], [one], [7]).item() for one in sampling]

    assert together == [4, *apart]
    assert len(set(apart)) > 2


def test_scores_that_are_not_numbers_give_no_token() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = torch.nan
    assert choose(logits, [GREEDY, GREEDY, Sampling(1.0)], [0] * 3).tolist()[1] == -1
