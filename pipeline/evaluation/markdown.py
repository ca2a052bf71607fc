"""Pieces of a page of Markdown: tables, pictures, and figures with their intervals.

A figure is a triple: measured, and the ends of its 95 % interval, as shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.evaluation.figures import excludes_zero


def picture(pictures: Mapping[str, str], name: str, words: str) -> list[str]:
    """A picture with a line below it, or nothing where it was not drawn."""
    return [f"![{words}]({pictures[name]})", "", f"*{words}*", ""] if name in pictures else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """One line a row."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def cell(triple: Sequence[float]) -> str:
    """Per cent, for a table."""
    value, low, high = (100 * part for part in triple)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def whole(share: float) -> str:
    """Per cent without decimals."""
    return f"{100 * share:.0f} %"


def percent(triple: Sequence[float]) -> str:
    """Per cent, for a sentence."""
    value, low, high = (100 * part for part in triple)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def points(triple: Sequence[float]) -> str:
    """A difference in points of a hundred, for a sentence."""
    value, low, high = (100 * part for part in triple)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def marked(triple: Sequence[float]) -> str:
    """A difference for a table, bold where the interval leaves out zero."""
    value, low, high = (100 * part for part in triple)
    words = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{words}**" if excludes_zero(triple) else words


def listed(names: Sequence[str]) -> str:
    """Words with commas and an and."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
