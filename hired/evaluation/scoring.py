"""One answer's score by the name of a metric, from 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from hired.errors import ConfigurationError
from hired.evaluation import metrics

Score = Callable[[str, Sequence[str]], float]

_THING = re.compile(r"a (\w+) (\w+)(?: saying (\w+))?")
_CHART = re.compile(r"a chart of (\w+) bars")


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction is one of the answers, whatever its case, without a full stop at the end."""
    said = prediction.strip().lower().removesuffix(".")
    return float(any(said == answer.strip().lower().removesuffix(".") for answer in answers))


def relaxed(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy against the answer that fits best."""
    return max(metrics.relaxed_accuracy(prediction, answer) for answer in answers)


def pope(prediction: str, answers: Sequence[str]) -> float:
    """Whether it says yes or no as the truth does, under POPE's rules."""
    return float(metrics.pope_answer(prediction) in answers)


def mme(prediction: str, answers: Sequence[str]) -> float:
    """The same under MME's rules, which read the first four characters."""
    return float(metrics.yes_or_no(prediction) in answers)


def contents(prediction: str, answers: Sequence[str]) -> float:
    """How well a caption lists what a painted scene holds: F1 of its objects and words.

    What counts is each thing's colour and name, each word on a sign and each chart's number of bars; places
    do not. The best over ``answers``.
    """
    said = Counter(_contents(prediction))
    return max(_f1(said, Counter(_contents(answer))) for answer in answers)


def _contents(caption: str) -> Iterator[tuple[str, ...]]:
    for phrase in caption.split(","):
        if chart := _CHART.search(phrase):
            yield "chart", chart[1]
        elif thing := _THING.search(phrase):
            yield thing[1], thing[2]
            if thing[3]:
                yield "word", thing[3]


def _f1(said: Counter[tuple[str, ...]], true: Counter[tuple[str, ...]]) -> float:
    total = said.total() + true.total()
    return 2 * (said & true).total() / total if total else 1.0


METRICS: dict[str, Score] = {
    "anls": metrics.anls,
    "contents": contents,
    "exact": exact,
    "mme": mme,
    "ocrbench": metrics.ocrbench_accuracy,
    "pope": pope,
    "relaxed": relaxed,
    "scienceqa": lambda prediction, answers: metrics.scienceqa_accuracy(prediction, answers[0]),
    "textvqa": metrics.textvqa_accuracy,
    "vqa": metrics.vqa_accuracy,
}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """From 0 to 1; raises ConfigurationError for an unknown metric."""
    check_metric(metric)
    return METRICS[metric](prediction, answers)


def check_metric(metric: str) -> None:
    """Raises ConfigurationError for an unknown metric."""
    if metric not in METRICS:
        raise ConfigurationError(f"there is no metric {metric!r}; use one of {', '.join(METRICS)}")
