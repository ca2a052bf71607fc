"""What the figures say, in sentences that are computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation import markdown as md
from pipeline.evaluation import records
from pipeline.evaluation.arms import KEEP_ALL
from pipeline.evaluation.figures import HIRED, excludes_zero
from pipeline.evaluation.records import Record

CONTROLS = ("random", "thumbnail")


def conclusions(record: Record) -> Iterator[str]:
    """One line a budget, one on the default, and what keeps the tasks from telling more."""
    table = record["table"]
    everything = table["arms"][f"{KEEP_ALL} at 1"]
    for rate in records.rates(table):
        hired = table["arms"].get(f"hired at {rate:g}")
        if not hired:
            continue
        kept = hired["mean"][0] / everything["mean"][0] if everything["mean"][0] else 0.0
        best = max(records.at(table, rate), key=lambda arm: arm["mean"][0])
        yield (
            f"- **{md.whole(rate)} of the tokens**: `hired` scores {md.percent(hired['mean'])}, "
            f"{100 * kept:.1f} % of what all tokens score. {_best(table, best, hired)} {_losses(table, rate)}"
        )
    yield from _default(table)
    low = [name for name, triple in everything["tasks"].items() if triple[0] < 0.75]
    if low:
        yield (
            f"- Even with all tokens the model scores below 75 % on {md.listed(low)}; there is less to lose "
            "there, and policies are harder to tell apart."
        )
    easy = [
        name for name, task in table["tasks"].items() if task["answered_by_full_image"] > task["items"] / 2
    ]
    if easy:
        yield (
            f"- The full-image alone answers more than half of {md.listed(easy)}. These tasks need no small "
            "detail, and say little about where tokens should come from."
        )


def _best(table: Record, best: Record, hired: Record) -> str:
    if best["mean"][0] <= hired["mean"][0]:
        return "No other policy has a higher mean."
    difference = table["differences"][f"{best['name']} at {best['rate']:g}"]["mean"]
    certain = "an order that the interval supports" if excludes_zero(difference) else "which may be chance"
    return (
        f"The highest mean is that of `{best['name']}`, {md.percent(best['mean'])}: {md.points(difference)} "
        f"against `hired`, {certain}."
    )


def _default(table: Record) -> Iterator[str]:
    """Whether a policy would replace HiRED, and if none would, what keeps the nearest one from it."""
    rates = records.rates(table)
    judged = [_judged(table, name, rates) for name in records.names(table) if name != HIRED]
    judged = [one for one in judged if len(one.ahead) + len(one.behind) + len(one.even) == len(rates)]
    if not judged or f"{HIRED} at {rates[0]:g}" not in table["arms"]:
        return
    best = max(judged, key=lambda one: (len(one.ahead), -len(one.behind), -len(one.lost)))
    rule = (
        "- **The default** would be another policy if its mean were above that of `hired` at every budget, "
        "the interval leaving out zero, and no task lost."
    )
    if len(best.ahead) == len(rates) and not best.lost:
        yield f"{rule} `{best.name}` meets this."
        return
    words = [f"No policy meets this, and `hired` stays. The nearest is `{best.name}`:"]
    parts = [
        f"{verb} {md.listed([md.whole(rate) for rate in some])}"
        for verb, some in (
            ("ahead at", best.ahead),
            ("not told apart at", best.even),
            ("behind at", best.behind),
        )
        if some
    ]
    words.append(f"{', '.join(parts)};")
    words.append(f"it loses {md.listed(best.lost)}." if best.lost else "no task loses.")
    yield f"{rule} {' '.join(words)}"


@dataclass(frozen=True, slots=True)
class _Judged:
    """A policy against HiRED: the budgets by what the interval of the mean says, and the tasks it loses."""

    name: str
    ahead: list[float]
    even: list[float]
    behind: list[float]
    lost: list[str]


def _judged(table: Record, name: str, rates: Sequence[float]) -> _Judged:
    cells = {rate: cell for rate in rates if (cell := table["differences"].get(f"{name} at {rate:g}"))}
    return _Judged(
        name,
        ahead=[rate for rate, cell in cells.items() if cell["mean"][1] > 0],
        even=[rate for rate, cell in cells.items() if cell["mean"][1] <= 0 <= cell["mean"][2]],
        behind=[rate for rate, cell in cells.items() if cell["mean"][2] < 0],
        lost=[
            f"{task} at {md.whole(rate)}"
            for rate, cell in cells.items()
            for task, triple in cell["tasks"].items()
            if triple[2] < 0
        ],
    )


def agreement(table: Record, other: Record) -> str:
    """How many orders against HiRED two trainings of a model agree on; the differences of either."""
    same, opposite, alone = 0, list[str](), 0
    for name, cell in table.items():
        one, two = cell["mean"], other[name]["mean"] if name in other else None
        if two is None:
            continue
        if excludes_zero(one) and excludes_zero(two):
            same += (one[0] > 0) == (two[0] > 0)
            opposite += [f"`{name}`"] if (one[0] > 0) != (two[0] > 0) else []
        elif excludes_zero(one) or excludes_zero(two):
            alone += 1
    words = f"Of the orders against `hired` that both support, {same} are the same"
    words += f"; {md.listed(opposite)} are not." if opposite else " and none is the opposite."
    return f"{words} {alone} more are supported by one of the two alone."


def _losses(table: Record, rate: float) -> str:
    """Where HiRED does not beat the controls."""
    words = []
    for control in CONTROLS:
        cell = table["differences"].get(f"{control} at {rate:g}")
        if cell is None:
            continue
        worse = [name for name, triple in cell["tasks"].items() if triple[1] > 0]
        even = [name for name, triple in cell["tasks"].items() if triple[1] <= 0 <= triple[2]]
        if worse:
            words.append(f"`{control}` is better on {md.listed(worse)}.")
        if even:
            words.append(f"Not told apart from `{control}` on {md.listed(even)}.")
        if not worse and not even:
            words.append(f"It beats `{control}` on every task.")
    return " ".join(words)
