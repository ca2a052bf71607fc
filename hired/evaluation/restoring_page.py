"""The restoring check as a page: Markdown tables, and one picture of gain against score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hired.budget import Budget
from hired.evaluation.restoring import NEEDED, Group, Restoring
from hired.evaluation.statistics import Interval

_DISTANCES = ((0.0, 1.5), (1.5, 2.5), (2.5, 4.0), (4.0, math.inf))


def page(results: Sequence[Restoring], *, command: str, model: str, picture: str) -> str:
    """The results as Markdown, with a link to the ``picture`` that ``plot`` has drawn."""
    first = results[0]
    return "\n".join(
        [
            "# Was something needed thrown away?",
            "",
            f"Model: {model}. Policy: {first.policy}. Made by `{command}`.",
            "",
            f"Dropped tokens are given back one group at a time: what was dropped of {first.block} x "
            f"{first.block} neighbouring patches of one partition. The gain is the rise of the logarithm of "
            "the answer's likelihood, in nats, with that group alone given back. A group was *needed* where "
            "the answer becomes at least twice as likely, *misleading* where it becomes at most half as "
            "likely. Whatever is given back jolts the model a little, upwards or downwards, so the surplus "
            "of needed over misleading groups says more than their number. A question was *hurt* where "
            "dropping made its answer at most half as likely as it is with all tokens. In "
            "brackets 95 % intervals, pictures drawn anew.",
            "",
            "## Questions",
            "",
            "| budget | task | questions | hurt | some one group needed | some one group misleading |",
            "|---|---|---|---|---|---|",
            *(row for result in results for row in _task_rows(result)),
            "",
            "## Does the score predict it?",
            "",
            "Spearman's rank correlation of a group's score, its tokens' mean CLS attention, with its gain: "
            "question by question over all that was dropped there, then the mean over questions.",
            "",
            "| budget | score | all questions | those that were hurt |",
            "|---|---|---|---|",
            *(row for result in results for row in _correlation_rows(result)),
            "",
            f"![Needed and misleading groups by score]({picture})",
            "",
            "## Where",
            "",
            "| budget | where | groups | needed | misleading | mean gain, nats |",
            "|---|---|---|---|---|---|",
            *(row for result in results for row in _place_rows(result)),
            "",
        ]
    )


def _correlation_rows(result: Restoring) -> Iterator[str]:
    for layer in result.layers:
        everywhere, where_hurt = (_signed(part.correlation(layer)) for part in (result, result.hurt))
        yield (
            f"| {_budget(result.budget)} | CLS attention of layer {layer} | {everywhere} | "
            f"{where_hurt} ({len(result.hurt.questions)} questions) |"
        )


def _place_rows(result: Restoring) -> Iterator[str]:
    for kind in ("full-image", "sub-image"):
        yield _groups_row(result, kind, [group for group in result.groups if group.kind == kind])
    for low, high in _DISTANCES:
        within = [group for group in result.groups if low <= group.distance < high]
        end = f"to {high:g}" if high < math.inf else "or more"
        yield _groups_row(result, f"{low:g} {end} patches from a kept token", within)
    alone = [group for group in result.groups if math.isinf(group.distance)]
    yield _groups_row(result, "in a partition that keeps nothing", alone)


def _groups_row(result: Restoring, where: str, groups: Sequence[Group]) -> str:
    if not groups:
        return f"| {_budget(result.budget)} | {where} | 0 | | | |"
    gains: NDArray[np.float64] = np.array([group.gain for group in groups])
    return (
        f"| {_budget(result.budget)} | {where} | {len(groups)} | {100 * (gains >= NEEDED).mean():.2f} % | "
        f"{100 * (gains <= -NEEDED).mean():.2f} % | {gains.mean():+.4f} |"
    )


def _task_rows(result: Restoring) -> Iterator[str]:
    yield _task_row(result, "all")
    for task in dict.fromkeys(question.task for question in result.questions):
        yield _task_row(result.of_task(task), task)


def _task_row(result: Restoring, task: str) -> str:
    shares = (
        result.share(lambda question: question.loss >= NEEDED),
        result.share(lambda question: question.largest_gain >= NEEDED),
        result.share(lambda question: question.largest_harm >= NEEDED),
    )
    told = " | ".join(map(_percent, shares))
    return f"| {_budget(result.budget)} | {task} | {len(result.questions)} | {told} |"


def _signed(value: Interval | None) -> str:
    return "none" if value is None else f"{value.measured:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def _percent(share: Interval) -> str:
    return f"{100 * share.measured:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _budget(budget: Budget) -> str:
    return f"{100 * budget.rate:g} %" if budget.rate is not None else f"{budget.tokens} tokens"


def plot(results: Sequence[Restoring], path: Path) -> None:
    """How often groups were needed and misleading, by tenth of their score within their question."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for result, frame in zip(results, axes, strict=True):
        tenths = np.arange(10)
        needed, misleading = by_score(result, result.layers[-1])
        frame.bar(tenths - 0.2, needed, 0.4, label="at least doubles the answer's likelihood")
        frame.bar(tenths + 0.2, misleading, 0.4, label="at least halves it")
        frame.set_title(f"{result.policy}, {_budget(result.budget)} of the tokens")
        frame.set_xlabel(f"tenth of the score (CLS attention of layer {result.layers[-1]})")
        frame.set_xticks(tenths, [str(tenth + 1) for tenth in tenths])
    axes[0].set_ylabel("share of the groups given back, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def by_score(result: Restoring, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per cent of the groups that were needed and that were misleading, by tenth of their score.

    Tenths are those of a question's own groups, lowest scores first.
    """
    counts = np.zeros((3, 10))
    for question in result.questions:
        ranked = sorted(question.groups, key=lambda group: group.scores[layer])
        for rank, group in enumerate(ranked):
            tenth = rank * 10 // len(ranked)
            counts[:, tenth] += (1, group.gain >= NEEDED, group.gain <= -NEEDED)
    total = np.maximum(counts[0], 1)
    return 100 * counts[1] / total, 100 * counts[2] / total
