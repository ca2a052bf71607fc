"""From answers to figures: means with intervals, differences from HiRED, tokens that were really sent.

A figure is a triple: measured, and the ends of its 95 % interval. Pictures are drawn, each with all of its
questions; the mean over tasks weighs all tasks alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hired.errors import ConfigurationError
from hired.evaluation.fastv import mean_visual_tokens
from hired.evaluation.statistics import Bootstrap, Interval, Statistic, mean, mean_over_tasks, over_seeds
from pipeline.evaluation.arms import FULL_IMAGE, KEEP_ALL

Array: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str, float]
Triple: TypeAlias = tuple[float, float, float]

HIRED = "hired"
SPREAD = "hired-spread"
# Fewer items than this say nothing about what is left when the easy ones are taken away.
FEWEST = 20
# A policy that sends so much more or less than its budget is named on the page.
TOLERATED = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What was answered: for each item its task and picture, for each arm ``[items]`` of scores and tokens.

    ``full_tokens`` are those of the same picture with all kept.
    """

    tasks: list[str]
    pictures: list[str]
    scores: dict[Key, Array]
    tokens: dict[Key, Array]
    newlines: dict[Key, Array]

    @classmethod
    def of(cls, table: pa.Table) -> Answers:
        """From the rows of a run, arms that differ by a seed alone taken together."""
        keys = pc.dictionary_encode(table["key"]).combine_chunks()
        items = keys.indices.to_numpy()
        num_items = len(keys.dictionary)
        names = [f"{name}@{rate!r}" for name, rate in zip(*_columns(table, "arm", "rate"), strict=True)]
        arms, of_arm = np.unique(names, return_inverse=True)
        columns = {}
        for column in ("score", "tokens", "newlines"):
            values = np.full((len(arms), num_items), np.nan)
            values[of_arm, items] = table[column].to_numpy()
            if np.isnan(values).any():
                raise ConfigurationError("an arm has not answered every item; the run is not complete")
            columns[column] = dict(zip(map(_key, arms), values, strict=True))
        first = np.unique(items, return_index=True)[1]
        tasks, pictures = (column.take(pa.array(first)).to_pylist() for column in _chunked(table))
        merged = {name: _over_seeds(values) for name, values in columns.items()}
        return cls(tasks, pictures, merged["score"], merged["tokens"], merged["newlines"])

    @property
    def task_names(self) -> list[str]:
        """The tasks in the order in which they come."""
        return list(dict.fromkeys(self.tasks))

    def within(self, task: str) -> NDArray[np.bool_]:
        """Which items belong to a task."""
        return np.array([other == task for other in self.tasks])


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def _chunked(table: pa.Table) -> list[Any]:
    return [table["task"].combine_chunks(), table["picture"].combine_chunks()]


def _key(arm: str) -> Key:
    name, _, rate = arm.rpartition("@")
    return name, float(rate)


def _over_seeds(values: dict[Key, Array]) -> dict[Key, Array]:
    """Arms named x, x#1, x#2 become x."""
    groups: dict[Key, dict[int, Array]] = {}
    for (name, rate), scores in values.items():
        own, _, seed = name.partition("#")
        groups.setdefault((own, rate), {})[int(seed or 0)] = scores
    return {key: over_seeds(runs) for key, runs in groups.items()}


def table(answers: Answers, draws: int) -> dict[str, Any]:
    """The record of the table: tasks, arms, and how they compare."""
    easy = answers.scores[FULL_IMAGE, 1.0] >= 1 - 1e-9
    arms = sorted(answers.scores, key=lambda key: (-key[1], key[0]))
    record: dict[str, Any] = {
        "tasks": {name: _about(answers, name, easy) for name in answers.task_names},
        "arms": {_name(key): _tokens(answers, key) for key in arms},
    }
    _fill(record["arms"], answers, arms, "tasks", "mean", draws, np.ones(len(easy), bool))
    _fill(record["arms"], answers, arms, "tasks_without_easy", "mean_without_easy", draws, ~easy)
    record["differences"] = differences(answers, arms, draws)
    return record


def ablations(answers: Answers, rate: float, draws: int) -> dict[str, Any]:
    """Each variant's mean over tasks, and how far it is from HiRED as it stands."""
    return {"rate": rate, **_against_hired(answers, draws)}


def in_language(answers: pa.Table, others: pa.Table, num_layers: int, draws: int) -> dict[str, Any]:
    """FastV's ``answers`` beside those of ``others`` that drop before the language model, same pictures.

    Of ``others`` everything kept, HiRED and what was made to beat it are taken. The cost of an arm is the
    visual tokens that a layer sees, newlines included, a mean over the ``num_layers`` layers.
    """
    beside = pc.and_(
        pc.is_in(others["picture"], answers["picture"].unique()),
        pc.is_in(others["arm"], pa.array([KEEP_ALL, HIRED, SPREAD])),
    )
    record = _against_hired(Answers.of(pa.concat_tables([others.filter(beside), answers])), draws)
    everything = sent(record["arms"][_name((KEEP_ALL, 1.0))])
    for arm in record["arms"].values():
        num_full_layers = int(arm["name"].partition("K=")[2] or 0)
        arm["tokens_a_layer"] = round(
            mean_visual_tokens(everything, sent(arm), num_layers, num_full_layers), 2
        )
    return record


def _against_hired(answers: Answers, draws: int) -> dict[str, Any]:
    """Every arm's tasks and mean, and how far it is from HiRED at the same budget."""
    arms = [key for key in answers.scores if key[0] != KEEP_ALL]
    everything = [(KEEP_ALL, 1.0), *arms]
    record: dict[str, Any] = {"arms": {_name(key): _tokens(answers, key) for key in everything}}
    _fill(record["arms"], answers, everything, "tasks", "mean", draws, np.ones(len(answers.tasks), bool))
    record["differences"] = differences(answers, arms, draws)
    record["items"], record["pictures"] = len(answers.tasks), len(set(answers.pictures))
    return record


def sent(arm: Mapping[str, Any]) -> float:
    """What reached the language model for an image, newlines included."""
    return float(arm["tokens"] + arm["newlines"])


def differences(answers: Answers, arms: Sequence[Key], draws: int) -> dict[str, Any]:
    """Each arm less HiRED at the same budget, where it is there: by task and in the mean over tasks."""
    pairs = [key for key in arms if key[0] != HIRED and (HIRED, key[1]) in answers.scores]
    found: dict[str, Any] = {_name(key): {"tasks": {}} for key in pairs}
    for task, member, bootstrap in _by_task(answers, draws):
        statistics = [
            mean(answers.scores[key][member] - answers.scores[HIRED, key[1]][member]) for key in pairs
        ]
        for key, interval in zip(pairs, bootstrap.intervals(statistics), strict=True):
            found[_name(key)]["tasks"][task] = _triple(interval)
    bootstrap = Bootstrap(answers.pictures, answers.tasks, num_draws=draws)
    over_all = [
        mean_over_tasks(answers.scores[key] - answers.scores[HIRED, key[1]], answers.tasks) for key in pairs
    ]
    for key, interval in zip(pairs, bootstrap.intervals(over_all), strict=True):
        found[_name(key)]["mean"] = _triple(interval)
    return found


def _about(answers: Answers, task: str, easy: NDArray[np.bool_]) -> dict[str, int]:
    member = answers.within(task)
    pictures = {picture for picture, inside in zip(answers.pictures, member, strict=True) if inside}
    return {
        "items": int(member.sum()),
        "pictures": len(pictures),
        "answered_by_full_image": int((member & easy).sum()),
    }


def _tokens(answers: Answers, key: Key) -> dict[str, Any]:
    """What really reached the language model, a mean over pictures."""
    first = np.unique(np.array(answers.pictures), return_index=True)[1]
    kept, full = answers.tokens[key][first], answers.tokens[KEEP_ALL, 1.0][first]
    budget = np.maximum(1, np.floor(key[1] * full + 1e-9))
    return {
        "name": key[0],
        "rate": key[1],
        "tokens": round(float(kept.mean()), 2),
        "newlines": round(float(answers.newlines[key][first].mean()), 2),
        "fewest": int(kept.min()),
        "most": int(kept.max()),
        "budget_used": round(float((kept / budget).mean()), 4),
    }


def _fill(
    cells: dict[str, Any],
    answers: Answers,
    arms: Sequence[Key],
    by_task: str,
    over_tasks: str,
    draws: int,
    among: NDArray[np.bool_],
) -> None:
    """Puts means and intervals of the items ``among`` all into the arms' records."""
    for key in arms:
        cells[_name(key)][by_task] = {}
    enough = [
        t for t in answers.task_names if (answers.within(t) & among).sum() >= min(FEWEST, _fewest(answers))
    ]
    for task, member, bootstrap in _by_task(answers, draws, among, enough):
        intervals = bootstrap.intervals([mean(answers.scores[key][member]) for key in arms])
        for key, interval in zip(arms, intervals, strict=True):
            cells[_name(key)][by_task][task] = _triple(interval)
    inside = among & np.array([task in enough for task in answers.tasks])
    if not inside.any():
        return
    tasks, pictures = _taken(answers.tasks, inside), _taken(answers.pictures, inside)
    statistics: list[Statistic] = [mean_over_tasks(answers.scores[key][inside], tasks) for key in arms]
    intervals = Bootstrap(pictures, tasks, num_draws=draws).intervals(statistics)
    for key, interval in zip(arms, intervals, strict=True):
        cells[_name(key)][over_tasks] = _triple(interval)


def _fewest(answers: Answers) -> int:
    """The items of the smallest task: a set may be small as a whole."""
    return min(int(answers.within(task).sum()) for task in answers.task_names)


def _by_task(
    answers: Answers,
    draws: int,
    among: NDArray[np.bool_] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[tuple[str, NDArray[np.bool_], Bootstrap]]:
    """Each task with its items and the draws of its pictures."""
    found = []
    for task in answers.task_names if tasks is None else tasks:
        member = answers.within(task) if among is None else answers.within(task) & among
        found.append((task, member, Bootstrap(_taken(answers.pictures, member), num_draws=draws)))
    return found


def _taken(values: Sequence[str], among: NDArray[np.bool_]) -> list[str]:
    return [value for value, inside in zip(values, among, strict=True) if inside]


def _name(key: Key) -> str:
    return f"{key[0]} at {key[1]:g}"


def _triple(interval: Interval) -> Triple:
    return round(interval.measured, 5), round(interval.low, 5), round(interval.high, 5)


def excludes_zero(triple: Sequence[float]) -> bool:
    """Whether an order may be claimed."""
    return triple[1] > 0 or triple[2] < 0
