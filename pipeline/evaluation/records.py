"""A record's arms in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pipeline.evaluation.arms import FULL_IMAGE, KEEP_ALL
from pipeline.evaluation.options import POLICIES

Record: TypeAlias = Mapping[str, Any]


def rates(table: Record) -> list[float]:
    """The budgets, the largest first."""
    return sorted(
        {arm["rate"] for arm in table["arms"].values() if arm["name"] not in (KEEP_ALL, FULL_IMAGE)},
        reverse=True,
    )


def at(table: Record, rate: float) -> list[Record]:
    """The policies' arms at one budget."""
    arms = {arm["name"]: arm for arm in table["arms"].values() if arm["rate"] == rate}
    return [arms[name] for name in names(table) if name in arms]


def names(table: Record) -> list[str]:
    """The policies, ours in the order of the documentation and then others'."""
    there = {arm["name"] for arm in table["arms"].values()} - {KEEP_ALL, FULL_IMAGE}
    return [*(name for name in POLICIES if name in there), *sorted(there - set(POLICIES))]


def curves(table: Record) -> dict[str, list[Record]]:
    """The arms of each policy, the smallest budget first."""
    return {
        name: [arm for rate in reversed(rates(table)) for arm in at(table, rate) if arm["name"] == name]
        for name in names(table)
    }
