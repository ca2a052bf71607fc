"""Intervals by the bootstrap: how far a score, or a difference of two, might be from what was measured.

Questions about one picture share its fortune, so pictures are drawn, each with all its questions. Two
policies are compared on the same draws: what makes a picture hard for both cancels out. Tasks are drawn from
apart, so that every draw has as many pictures of each. Percentile intervals (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weights: TypeAlias = NDArray[np.float64]
# From how often each item was drawn, ``[draws, items]``, to one value a draw.
Statistic: TypeAlias = Callable[[Weights], NDArray[np.float64]]

# Ends of a 95 % interval then vary by some hundredths of its width from seed to seed.
NUM_DRAWS = 10_000
_DRAWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Interval:
    """What was measured, and the ends between which ``level`` of the draws lie."""

    measured: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether an order may be claimed, of a difference."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Draws from the items of an evaluation, the same for every statistic that is asked for.

    ``pictures`` names each item's picture, ``tasks`` its task (one for all if left out); a picture in two
    tasks counts as two. The same ``seed`` draws the same. Raises ValueError without items, and where items
    and tasks are not of one number.
    """

    def __init__(
        self,
        pictures: Sequence[Hashable],
        tasks: Sequence[Hashable] | None = None,
        *,
        seed: int = 0,
        num_draws: int = NUM_DRAWS,
    ) -> None:
        if not pictures:
            raise ValueError("there is nothing to draw from")
        named = zip(tasks if tasks is not None else [None] * len(pictures), pictures, strict=True)
        numbers: dict[tuple[Hashable, Hashable], int] = {}
        self._group = np.array([numbers.setdefault(pair, len(numbers)) for pair in named])
        task_of_group = [task for task, _ in numbers]
        self._groups_by_task = [
            np.flatnonzero([other == task for other in task_of_group])
            for task in dict.fromkeys(task_of_group)
        ]
        self._seed, self._num_draws = seed, num_draws

    def interval(self, statistic: Statistic, *, level: float = 0.95) -> Interval:
        """The statistic of the items as they are, and where it lies in ``level`` of the draws.

        A draw for which it is no number (a precision where nobody says yes) is left out.
        """
        return self.intervals([statistic], level=level)[0]

    def intervals(self, statistics: Sequence[Statistic], *, level: float = 0.95) -> list[Interval]:
        """The same of several statistics, all of the same draws, which are made once."""
        as_they_are = np.ones((1, len(self._group)))
        drawn: list[list[NDArray[np.float64]]] = [[] for _ in statistics]
        for weights in self._draws():
            for values, statistic in zip(drawn, statistics, strict=True):
                values.append(statistic(weights))
        outside = (1 - level) / 2
        ends = [np.nanquantile(np.concatenate(values), [outside, 1 - outside]) for values in drawn]
        return [
            Interval(float(statistic(as_they_are)[0]), float(low), float(high), level)
            for statistic, (low, high) in zip(statistics, ends, strict=True)
        ]

    def difference(self, one: Statistic, other: Statistic, *, level: float = 0.95) -> Interval:
        """``one`` less ``other``, both of the same draws."""
        return self.interval(lambda weights: one(weights) - other(weights), level=level)

    def _draws(self) -> Iterator[Weights]:
        """How often each item is drawn, ``[draws, items]``: every task's pictures with replacement."""
        random = np.random.default_rng(self._seed)
        for start in range(0, self._num_draws, _DRAWS_AT_ONCE):
            size = min(_DRAWS_AT_ONCE, self._num_draws - start)
            times = np.empty((size, self._group.max() + 1))
            for groups in self._groups_by_task:
                times[:, groups] = random.multinomial(
                    len(groups), np.full(len(groups), 1 / len(groups)), size=size
                )
            yield times[:, self._group]


def mean(scores: ArrayLike) -> Statistic:
    """The mean of the items' ``scores``."""
    values = _checked(scores)

    def statistic(weights: Weights) -> NDArray[np.float64]:
        total: NDArray[np.float64] = (weights @ values) / weights.sum(-1)
        return total

    return statistic


def mean_over_tasks(scores: ArrayLike, tasks: Sequence[Hashable]) -> Statistic:
    """The mean over tasks of each task's mean, whatever the number of its items."""
    values = _checked(scores)
    members = [np.array([other == task for other in tasks]) for task in dict.fromkeys(tasks)]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        means = [mean(values[member])(weights[:, member]) for member in members]
        total: NDArray[np.float64] = np.mean(means, axis=0)
        return total

    return statistic


def over_seeds(scores_by_seed: Mapping[int, ArrayLike]) -> NDArray[np.float64]:
    """Each item's mean over runs that differ by their seed, to be drawn from as one score.

    An interval then speaks of other pictures, not of other seeds: three are too few to draw from.
    """
    runs = [_checked(scores) for scores in scores_by_seed.values()]
    if not runs or len({len(run) for run in runs}) > 1:
        raise ValueError(f"runs of one set of items are needed, got {[len(run) for run in runs]} items")
    averaged: NDArray[np.float64] = np.mean(runs, axis=0)
    return averaged


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("scores are one finite number an item; an item without an answer has a score of 0")
    return values
