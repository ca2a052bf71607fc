"""The record's figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from pipeline.evaluation import paper
from pipeline.evaluation.arms import FULL_IMAGE, KEEP_ALL
from pipeline.evaluation.figures import sent
from pipeline.evaluation.records import Record, curves
from pipeline.storage import Store

_MARKERS = "osD^vP*X<>hdp"
_STRONG = {"hired": "#c1121f", "random": "#6c757d", "thumbnail": "#343a40", "keep-all": "black"}
DPI = 110


def plot(record: Record, store: Store) -> dict[str, str]:
    """Writes what the record has figures for; the files' names by what they show."""
    drawn: dict[str, str] = {}
    makers = {
        "pareto-tokens": (_pareto_tokens, "table"),
        "pareto-speed": (_pareto_speed, "table"),
        "tasks": (_tasks, "table"),
        "tokens-an-image": (_tokens_an_image, "table"),
        "alpha": (_alpha, "ablations"),
        "ablations": (_ablations, "ablations"),
        "fastv": (_fastv, "fastv"),
        "attention-share": (_attention_share, "attention"),
        "attention-maps": (_attention_maps, "attention"),
    }
    for name, (make, section) in makers.items():
        if section not in record or (figure := make(record)) is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format="png", bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        drawn[name] = f"{name}.png"
        store.write(drawn[name], buffer.getvalue())
    return drawn


def _style(number: int, name: str) -> dict[str, Any]:
    # Without the reds and greys, which are taken.
    colours = [c for i, c in enumerate(plt.get_cmap("tab20").colors) if i not in (6, 7, 14, 15)]  # type: ignore[attr-defined]
    return {
        "color": _STRONG.get(name, colours[number % len(colours)]),
        "marker": _MARKERS[number % len(_MARKERS)],
        "linewidth": 2.4 if name in _STRONG else 1.2,
        "markersize": 5,
        "label": name,
        "zorder": 3 if name in _STRONG else 2,
    }


def _pareto_tokens(record: Record) -> Figure:
    """Accuracy against what the language model was really sent."""
    figure, axes = plt.subplots(figsize=(8.6, 5.6))
    table = record["table"]
    for number, (name, arms) in enumerate(curves(table).items()):
        means = np.array([arm["mean"] for arm in arms]) * 100
        errors = np.abs(means[:, 1:].T - means[:, 0])
        axes.errorbar(
            [sent(arm) for arm in arms], means[:, 0], yerr=errors, capsize=2, elinewidth=0.7,
            **_style(number, name),
        )  # fmt: skip
    for name, words, above in ((KEEP_ALL, "all tokens", 7), (FULL_IMAGE, "full-image alone", -16)):
        arm = table["arms"][f"{name} at 1"]
        axes.scatter([sent(arm)], [arm["mean"][0] * 100], color="black", zorder=4, s=24)
        axes.annotate(
            words, (sent(arm), arm["mean"][0] * 100), (0, above), textcoords="offset points", ha="center"
        )
    _finish(axes, "tokens an image that reached the language model, newlines included", "mean over tasks, %")
    axes.set_xscale("log")
    ticks = [20, 50, 100, 200, 500, 1000, 2000]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.get_xaxis().set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _pareto_speed(record: Record) -> Figure | None:
    """Accuracy against images/s, for the arms whose speed a benchmark has."""
    points = speeds(record)
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    rates, means = [rate for _, rate, _ in points], [mean for _, _, mean in points]
    values = np.array(means) * 100
    axes.errorbar(
        rates, values[:, 0], yerr=np.abs(values[:, 1:].T - values[:, 0]), color=_STRONG["hired"],
        marker="o", capsize=2, linewidth=1.5,
    )  # fmt: skip
    for (name, rate, _), value in zip(points, values[:, 0], strict=True):
        axes.annotate(name, (rate, value), (4, 7), textcoords="offset points", fontsize=9)
    axes.margins(x=0.16, y=0.2)
    _finish(axes, "images/s, from bytes to captions", "mean over tasks, %")
    return figure


def speeds(record: Record) -> list[tuple[str, float, Sequence[float]]]:
    """Name, images/s and mean over tasks of the arms that both this run and the benchmark have."""
    if not record.get("speed") or "table" not in record:
        return []
    found = []
    for name, rate in record["speed"]["images_per_s"].items():
        policy, _, percent = name.rpartition("-")
        key = f"{KEEP_ALL} at 1" if name == KEEP_ALL else f"{policy} at {_rate(percent):g}"
        if arm := record["table"]["arms"].get(key):
            found.append((name if name == KEEP_ALL else f"{policy} {percent} %", rate, arm["mean"]))
    return sorted(found, key=lambda point: point[1])


def _rate(percent: str) -> float:
    return int(percent) / 100 if percent.isdigit() else -1.0


def _tasks(record: Record) -> Figure:
    """Each task's score by budget."""
    table = record["table"]
    names = list(table["tasks"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 2.9 * rows), squeeze=False, sharex=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, names, strict=False):
        for number, (name, arms) in enumerate(curves(table).items()):
            rates = [arm["rate"] * 100 for arm in arms]
            axes.plot(rates, [arm["tasks"][task][0] * 100 for arm in arms], **_style(number, name))
        level = table["arms"][f"{KEEP_ALL} at 1"]["tasks"][task][0] * 100
        axes.axhline(level, color="black", linestyle=":", linewidth=1)
        axes.set_title(task, fontsize=10)
        axes.set_ylim(-3, 103)
        _finish(axes, "", "")
        axes.set_xscale("log")
        axes.set_xticks([arm["rate"] * 100 for arm in next(iter(curves(table).values()))])
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncol=7, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0)
    )
    figure.supxlabel("budget, % of the tokens", fontsize=10, y=0.075)
    figure.supylabel("score, %", fontsize=10)
    figure.tight_layout(rect=(0.01, 0.09, 1, 1))
    return figure


def _tokens_an_image(record: Record) -> Figure:
    """How many tokens an image sends, by policy: the mean, and from the fewest to the most."""
    arms = [record["table"]["arms"][f"{KEEP_ALL} at 1"]]
    arms += [arm for arms_of in curves(record["table"]).values() for arm in reversed(arms_of)]
    figure, axes = plt.subplots(figsize=(8, 0.17 * len(arms) + 1.2))
    for place, arm in enumerate(reversed(arms)):
        colour = _STRONG.get(arm["name"], "#457b9d")
        axes.plot([arm["fewest"], arm["most"]], [place, place], color=colour, linewidth=1)
        axes.scatter([arm["tokens"]], [place], color=colour, s=12, zorder=3)
    labels = [f"{arm['name']} {arm['rate'] * 100:g} %" for arm in reversed(arms)]
    axes.set_yticks(range(len(arms)), labels, fontsize=6.5)
    axes.set_ylim(-1, len(arms))
    _finish(axes, "visual tokens an image, newlines left out", "")
    return figure


def _alpha(record: Record) -> Figure | None:
    """The mean over tasks by the full-image's share of the budget."""
    section = record["ablations"]
    rate = section["rate"]
    points = [(0.5, section["arms"][f"hired at {rate:g}"]["mean"])]
    for arm in section["arms"].values():
        if arm["name"].startswith("alpha "):
            points.append((float(arm["name"].removeprefix("alpha ")), arm["mean"]))
    if len(points) < 3:
        return None
    points.sort()
    means = np.array([mean for _, mean in points]) * 100
    figure, axes = plt.subplots(figsize=(6.4, 4))
    alphas = [alpha for alpha, _ in points]
    axes.fill_between(alphas, means[:, 1], means[:, 2], color=_STRONG["hired"], alpha=0.15, linewidth=0)
    axes.plot(alphas, means[:, 0], color=_STRONG["hired"], marker="o")
    axes.axvline(paper.BEST_ALPHA, color="grey", linestyle=":", linewidth=1)
    place = (paper.BEST_ALPHA, axes.get_ylim()[0])
    axes.annotate("the paper's best", place, (4, 4), textcoords="offset points", fontsize=8, color="grey")
    _finish(
        axes,
        "alpha: the full-image's share of the budget",
        f"mean over tasks at {100 * rate:.0f} % of the tokens, %",
    )
    return figure


def _ablations(record: Record) -> Figure | None:
    """Each change's difference from HiRED."""
    differences = [
        (name.rpartition(" at ")[0], cell["mean"])
        for name, cell in record["ablations"]["differences"].items()
        if not name.startswith("alpha ")
    ]
    if not differences:
        return None
    differences.sort(key=lambda pair: pair[1][0])
    figure, axes = plt.subplots(figsize=(7.4, 0.27 * len(differences) + 1.1))
    for place, (_, triple) in enumerate(differences):
        value, low, high = (100 * part for part in triple)
        certain = low > 0 or high < 0
        colour = ("#2a9d8f" if value > 0 else _STRONG["hired"]) if certain else "#8d99ae"
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
        axes.scatter([value], [place], color=colour, s=20, zorder=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(differences)), [name for name, _ in differences], fontsize=8)
    _finish(axes, "mean over tasks less HiRED's, points of a hundred", "")
    return figure


def _fastv(record: Record) -> Figure:
    """Accuracy against the tokens that a layer of the language model sees."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    section = record["fastv"]
    for number, (name, arms) in enumerate(curves(section).items()):
        means = np.array([arm["mean"] for arm in arms]) * 100
        axes.errorbar(
            [arm["tokens_a_layer"] for arm in arms], means[:, 0], yerr=np.abs(means[:, 1:].T - means[:, 0]),
            capsize=2, elinewidth=0.7, **_style(number, name),
        )  # fmt: skip
    everything = section["arms"][f"{KEEP_ALL} at 1"]
    axes.scatter(
        [everything["tokens_a_layer"]], [everything["mean"][0] * 100], color="black", label="all tokens"
    )
    axes.legend(frameon=False, fontsize=9)
    _finish(axes, "visual tokens that a layer sees, a mean over layers", "mean over tasks, %")
    return figure


def _attention_share(record: Record) -> Figure | None:
    """How much of the language model's attention to visual tokens the top ones hold."""
    shares = record["attention"]["language_model"]
    if isinstance(shares, str):
        return None
    points = [(0.0, 0.0), *((float(share), held) for share, held in shares.items()), (1.0, 1.0)]
    figure, axes = plt.subplots(figsize=(5.6, 4))
    axes.plot(
        *zip(*[(100 * x, 100 * y) for x, y in points], strict=True), color="#1d3557", marker="o", label="here"
    )
    theirs = [(100 * x, 100 * y) for x, y in paper.FIGURE_2.items()]
    axes.scatter(
        *zip(*theirs, strict=True), color="#e76f51", marker="s", zorder=3, label="the paper, LLaVA-NeXT-7B"
    )
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", linewidth=1, label="all alike")
    axes.legend(frameon=False, fontsize=9)
    _finish(axes, "top visual tokens, %", "attention that they hold, %")
    return figure


def _attention_maps(record: Record) -> Figure | None:
    """What CLS attends to in the full-image, a row a picture, a column a layer."""
    maps = record["attention"]["maps"]
    if not maps:
        return None
    rows, columns = len(maps), len(maps[0]["layers"])
    figure, grid = plt.subplots(rows, columns, figsize=(1.9 * columns, 1.95 * rows), squeeze=False)
    for own, row in zip(maps, grid, strict=True):
        for layer, (values, axes) in enumerate(zip(own["layers"], row, strict=True)):
            axes.imshow(values, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
            if own is maps[0]:
                axes.set_title(f"layer {layer}", fontsize=9)
    figure.tight_layout()
    return figure


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
