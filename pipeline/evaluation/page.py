"""The record as a page of Markdown. What it concludes is computed from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hired.evaluation.tasks import TASKS
from pipeline.evaluation import paper
from pipeline.evaluation.arms import FULL_IMAGE, KEEP_ALL
from pipeline.evaluation.figures import TOLERATED, excludes_zero
from pipeline.evaluation.options import POLICIES
from pipeline.evaluation.plots import speeds

Record = Mapping[str, Any]
CONTROLS = ("random", "thumbnail")


def page(record: Record, pictures: Mapping[str, str]) -> str:
    """The whole page; ``pictures`` are files by what they show."""
    lines = [f"# Accuracy: {record['model']['name']}", "", _surroundings(record), ""]
    if "table" in record:
        lines += ["## What the figures say", "", *_conclusions(record), ""]
        lines += _tasks(record["table"])
        lines += _picture(pictures, "pareto-tokens", "Mean over tasks against tokens, with 95 % intervals.")
        lines += _tables(record)
        lines += _picture(pictures, "tasks", "Each task by budget. Dotted: all tokens.")
        lines += _without_easy(record["table"])
        lines += _differences(record["table"])
        lines += _tokens(record["table"], pictures)
        lines += _speed(record, pictures)
    if "ablations" in record:
        lines += _ablations(record["ablations"], pictures)
    if "attention" in record:
        lines += _attention(record["attention"], pictures)
    lines += _paper()
    return "\n".join(lines).rstrip() + "\n"


def _surroundings(record: Record) -> str:
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    left_out = "".join(f" Left out: {name}, which {why}." for name, why in record["left_out"].items())
    asked = ", ".join(record["tasks"]) or f"pictures drawn by seed {record['seed']}, {record['split']} split"
    return (
        f"{record['items']:,} questions about {record['pictures']:,} pictures ({asked}); "
        f"{record['hardware']}; {known}; weights {record['model']['sha256'][:12]}; "
        f"commit {record['commit']}; {record['measured_at'][:10]}.{left_out}\n\n"
        f"    {record['command']}\n\n"
        f"Scores are in per cent with 95 % intervals: {record['draws']:,} draws of pictures, each with all "
        "of its questions, the same draws for all arms. `random` is the mean of "
        f"{record['random_seeds']} seeds."
    )


def _conclusions(record: Record) -> Iterator[str]:
    table = record["table"]
    everything = table["arms"][f"{KEEP_ALL} at 1"]
    for rate in _rates(table):
        hired = table["arms"].get(f"hired at {rate:g}")
        if not hired:
            continue
        kept = hired["mean"][0] / everything["mean"][0] if everything["mean"][0] else 0.0
        best = max(_at(table, rate), key=lambda arm: arm["mean"][0])
        yield (
            f"- **{_whole(rate)} of the tokens**: `hired` scores {_percent(hired['mean'])}, "
            f"{100 * kept:.1f} % of what all tokens score. {_best(table, best, hired)} {_losses(table, rate)}"
        )
    low = [name for name, triple in everything["tasks"].items() if triple[0] < 0.75]
    if low:
        yield (
            f"- Even with all tokens the model scores below 75 % on {_listed(low)}; there is less to lose "
            "there, and policies are harder to tell apart."
        )
    easy = [
        name for name, task in table["tasks"].items() if task["answered_by_full_image"] > task["items"] / 2
    ]
    if easy:
        yield (
            f"- The full-image alone answers more than half of {_listed(easy)}. These tasks need no small "
            "detail, and say little about where tokens should come from."
        )


def _best(table: Record, best: Record, hired: Record) -> str:
    if best["mean"][0] <= hired["mean"][0]:
        return "No other policy has a higher mean."
    difference = table["differences"][f"{best['name']} at {best['rate']:g}"]["mean"]
    certain = "an order that the interval supports" if excludes_zero(difference) else "which may be chance"
    return (
        f"The highest mean is that of `{best['name']}`, {_percent(best['mean'])}: {_points(difference)} "
        f"against `hired`, {certain}."
    )


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
            words.append(f"`{control}` is better on {_listed(worse)}.")
        if even:
            words.append(f"Not told apart from `{control}` on {_listed(even)}.")
        if not worse and not even:
            words.append(f"It beats `{control}` on every task.")
    return " ".join(words)


def _tasks(table: Record) -> list[str]:
    known = {task.name: task for task in TASKS}
    rows = []
    for name, about in table["tasks"].items():
        task = known.get(name)
        score = table["arms"][f"{KEEP_ALL} at 1"]["tasks"][name]
        rows.append(
            [
                name,
                task.title if task else "",
                task.like if task else "",
                task.metric if task else "",
                f"{about['items']:,}",
                f"{about['pictures']:,}",
                _whole(about["answered_by_full_image"] / about["items"]),
                _cell(score),
            ]
        )
    head = (
        "task",
        "asked",
        "in the manner of",
        "metric",
        "questions",
        "pictures",
        "full-image answers",
        "all tokens",
    )
    return ["## Tasks", "", *_table(head, rows), ""]


def _tables(record: Record) -> list[str]:
    table = record["table"]
    tasks = list(table["tasks"])
    lines = [
        "## Scores",
        "",
        "Tokens are those that reached the language model, a mean over pictures; newlines come beside them.",
        "",
    ]
    for rate in _rates(table):
        arms = [table["arms"][f"{KEEP_ALL} at 1"], table["arms"][f"{FULL_IMAGE} at 1"], *_at(table, rate)]
        rows = [
            [
                arm["name"],
                f"{arm['tokens']:.0f} + {arm['newlines']:.0f}",
                *(_cell(arm["tasks"][task]) for task in tasks),
                _cell(arm["mean"]),
            ]
            for arm in arms
        ]
        lines += [
            f"### {_whole(rate)} of the tokens",
            "",
            *_table(("policy", "tokens", *tasks, "mean"), rows),
            "",
        ]
    return lines


def _without_easy(table: Record) -> list[str]:
    """The mean over tasks of what the full-image alone does not answer."""
    first = next(iter(table["arms"].values()))
    if "mean_without_easy" not in first:
        return []
    tasks = list(first["tasks_without_easy"])
    lines = [
        "## Without what the full-image answers",
        "",
        "Items that the full-image alone answers in full, with all its tokens kept, are left out here. "
        f"Tasks of which too few remain are left out with them; what is left: {_listed(tasks)}. Means over "
        "these tasks.",
        "",
    ]
    rates = _rates(table)
    names = list(dict.fromkeys(arm["name"] for rate in rates for arm in _at(table, rate)))
    rows = [["all tokens", *[_cell(table["arms"][f"{KEEP_ALL} at 1"]["mean_without_easy"])] * len(rates)]]
    for name in names:
        cells = [table["arms"].get(f"{name} at {rate:g}") for rate in rates]
        rows.append([name, *(_cell(cell["mean_without_easy"]) if cell else "" for cell in cells)])
    return [*lines, *_table(("policy", *(f"{_whole(rate)}" for rate in rates)), rows), ""]


def _differences(table: Record) -> list[str]:
    if not table["differences"]:
        return []
    lines = [
        "## Against HiRED",
        "",
        "Mean over tasks less that of `hired` at the same budget, in points of a hundred. Bold where the "
        "interval leaves out zero.",
        "",
    ]
    rates, cells = _rates(table), table["differences"]
    names = [name for name in _names(table) if name != "hired"]
    rows = []
    for name in names:
        own = [cells.get(f"{name} at {rate:g}") for rate in rates]
        rows.append([name, *(_marked(cell["mean"]) if cell else "" for cell in own)])
    return [*lines, *_table(("policy", *(f"{_whole(rate)}" for rate in rates)), rows), ""]


def _tokens(table: Record, pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Tokens an image", ""]
    lines += _picture(
        pictures, "tokens-an-image", "From the fewest to the most an image; the dot is the mean."
    )
    unused = [
        f"`{arm['name']}` at {_whole(arm['rate'])} uses {_whole(arm['budget_used'])} of its budget"
        for rate in _rates(table)
        for arm in _at(table, rate)
        if abs(arm["budget_used"] - 1) > TOLERATED
    ]
    if unused:
        lines += [f"{'; '.join(unused)}. All others are within 1 % of theirs.", ""]
    theirs = "; ".join(f"{name} {tokens}" for name, tokens in paper.FIGURE_5.items())
    return [*lines, f"The paper's figure 5, on TextVQA with LLaVA-NeXT-7B: {theirs}.", ""]


def _speed(record: Record, pictures: Mapping[str, str]) -> list[str]:
    if not speeds(record):
        return []
    source = record["speed"]
    return [
        "## Accuracy against speed",
        "",
        *_picture(pictures, "pareto-speed", "Mean over tasks against images/s."),
        f"Images/s were not measured here: they are those of `{source['file']}` ({source['hardware']}, "
        f"commit {source['commit']}), which has no other arms:",
        "",
        f"    {source['command']}",
        "",
    ]


def _ablations(section: Record, pictures: Mapping[str, str]) -> list[str]:
    rate = section["rate"]
    lines = [
        "## Ablations",
        "",
        f"HiRED at {_whole(rate)} of the tokens with one decision changed, on {section['items']:,} questions "
        f"about {section['pictures']:,} pictures. Differences are in points of a hundred, bold where the "
        "interval leaves out zero. `hired` allocates by layer 0, selects by the feature layer, sums over "
        "heads, keeps original positions and closes the rows that keep a token.",
        "",
    ]
    lines += _picture(pictures, "ablations", "Green: better than HiRED; red: worse; grey: not told apart.")
    rows = []
    first = (KEEP_ALL, "hired")
    for name, arm in sorted(section["arms"].items(), key=lambda pair: pair[1]["name"] not in first):
        if arm["name"].startswith("alpha "):
            continue
        difference = section["differences"].get(name)
        rows.append(
            [
                arm["name"],
                f"{arm['tokens']:.0f} + {arm['newlines']:.0f}",
                _cell(arm["mean"]),
                _marked(difference["mean"]) if difference else "",
            ]
        )
    lines += [*_table(("changed", "tokens", "mean over tasks", "less hired"), rows), ""]
    lines += _picture(pictures, "alpha", "The full-image's share of the budget.")
    alphas = {
        float(arm["name"].removeprefix("alpha ")): arm["mean"]
        for arm in section["arms"].values()
        if arm["name"].startswith("alpha ")
    }
    if alphas:
        alphas[0.5] = section["arms"][f"hired at {rate:g}"]["mean"]
        best = max(alphas, key=lambda alpha: alphas[alpha][0])
        words = ""
        if best != 0.5:
            difference = section["differences"][f"alpha {best:.1f} at {rate:g}"]["mean"]
            words = f", {_points(difference)} against 0.5"
        lines += [
            f"The best alpha here is {best:g}{words}; in the paper (figure 6) it is {paper.BEST_ALPHA:g}.",
            "",
        ]
    head = ("the paper's table 5, LLaVA-NeXT-7B at 20 %", "the arm here", *paper.ABLATION_BENCHMARKS)
    theirs = [[title, arm, *map(str, values)] for arm, (title, values) in paper.TABLE_5.items()]
    return [*lines, *_table(head, theirs), ""]


def _attention(section: Record, pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Attention", ""]
    shares = section["language_model"]
    if isinstance(shares, str):
        lines += [shares, ""]
    else:
        ours = ", ".join(f"{_whole(float(share))} hold {_whole(held)}" for share, held in shares.items())
        theirs = ", ".join(f"{_whole(share)} hold {_whole(held)}" for share, held in paper.FIGURE_2.items())
        lines += [
            "What the last token of the prompt attends to among the visual tokens, all kept, a mean over "
            f"heads, layers and {section['pictures']} pictures: the top {ours}. The paper's figure 2: the "
            f"top {theirs}.",
            "",
        ]
        lines += _picture(pictures, "attention-share", "Attention held by the most attended tokens.")
    rows = []
    for share, counts in section["by_partition"].items():
        if counts is not None:
            rows.append([f"here, top {_whole(float(share))}", *(f"{count:.1f}" for count in counts)])
    for share, numbers in paper.TABLE_2.items():
        rows.append([f"the paper, top {_whole(share)}", *map(str, numbers)])
    lines += [
        "Where the patches lie that CLS attends to most, over all partitions, in the "
        f"{section['of_grid']} pictures of two by two sub-images. Beside it the paper's table 2, of some "
        "2,880 tokens an image.",
        "",
        *_table(("", *paper.PARTITIONS), rows),
        "",
    ]
    words = "CLS attention in the full-image, layer by layer; the last one is the feature layer."
    return [*lines, *_picture(pictures, "attention-maps", words)]


def _paper() -> list[str]:
    rows = [[name, *(f"{value:g}" for value in values)] for name, values in paper.TABLE_3.items()]
    return [
        "## The paper's table 3",
        "",
        f"LLaVA-NeXT-7B on photographs and documents; {paper.SOURCE}. Theirs, not measured here; another "
        "model and other tasks, so levels do not compare.",
        "",
        *_table(("", *paper.BENCHMARKS), rows),
        "",
    ]


def _rates(table: Record) -> list[float]:
    return sorted(
        {arm["rate"] for arm in table["arms"].values() if arm["name"] not in (KEEP_ALL, FULL_IMAGE)},
        reverse=True,
    )


def _at(table: Record, rate: float) -> list[Record]:
    arms = {a["name"]: a for a in table["arms"].values() if a["rate"] == rate}
    return [arms[name] for name in _names(table) if name in arms]


def _names(table: Record) -> list[str]:
    """The policies, ours in the order of the documentation and then others'."""
    there = {arm["name"] for arm in table["arms"].values()} - {KEEP_ALL, FULL_IMAGE}
    return [*(name for name in POLICIES if name in there), *sorted(there - set(POLICIES))]


def _picture(pictures: Mapping[str, str], name: str, words: str) -> list[str]:
    return [f"![{words}]({pictures[name]})", "", f"*{words}*", ""] if name in pictures else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _cell(triple: Sequence[float]) -> str:
    value, low, high = (100 * part for part in triple)
    return f"{value:.1f} [{low:.0f}, {high:.0f}]"


def _whole(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percent(triple: Sequence[float]) -> str:
    value, low, high = (100 * part for part in triple)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def _points(triple: Sequence[float]) -> str:
    value, low, high = (100 * part for part in triple)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def _marked(triple: Sequence[float]) -> str:
    value, low, high = (100 * part for part in triple)
    words = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{words}**" if excludes_zero(triple) else words


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
