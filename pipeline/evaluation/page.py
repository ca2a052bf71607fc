"""The record as a page of Markdown. What it concludes is computed from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hired.evaluation.tasks import TASKS
from pipeline.evaluation import markdown as md
from pipeline.evaluation import paper, records
from pipeline.evaluation.arms import FULL_IMAGE, KEEP_ALL
from pipeline.evaluation.conclusions import agreement, conclusions
from pipeline.evaluation.figures import TOLERATED
from pipeline.evaluation.plots import speeds
from pipeline.evaluation.records import Record

# Pages of other jobs that may lie in the same folder.
MORE = {
    "restoring.md": "what a dropped token would have changed, and whether its score says so",
    "fidelity.md": "how far captions of photographs change, without labels",
}


def page(record: Record, pictures: Mapping[str, str], more: Sequence[str] = ()) -> str:
    """The whole page; ``pictures`` are files by what they show, ``more`` the other pages of the folder."""
    lines = [f"# Accuracy: {record['model']['name']}", "", _surroundings(record), ""]
    if "table" in record:
        lines += ["## What the figures say", "", *conclusions(record), ""]
        lines += _tasks(record["table"])
        lines += md.picture(pictures, "pareto-tokens", "Mean over tasks against tokens, with 95 % intervals.")
        lines += _tables(record)
        lines += md.picture(pictures, "tasks", "Each task by budget. Dotted: all tokens.")
        lines += _without_easy(record["table"])
        lines += _differences(record["table"])
        lines += _tokens(record["table"], pictures)
        lines += _speed(record, pictures)
    if "ablations" in record:
        lines += _ablations(record["ablations"], pictures)
    if "fastv" in record:
        lines += _fastv(record["fastv"], pictures)
    for other in record.get("beside", []):
        lines += _beside(record["table"], other)
    if "attention" in record:
        lines += _attention(record["attention"], pictures)
    lines += _paper()
    if more:
        lines += ["## More", "", *(f"- [{name}]({name}): {MORE[name]}" for name in more), ""]
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
                md.whole(about["answered_by_full_image"] / about["items"]),
                md.cell(score),
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
    return ["## Tasks", "", *md.table(head, rows), ""]


def _tables(record: Record) -> list[str]:
    table = record["table"]
    tasks = list(table["tasks"])
    lines = [
        "## Scores",
        "",
        "Tokens are those that reached the language model, a mean over pictures; newlines come beside them.",
        "",
    ]
    for rate in records.rates(table):
        arms = [
            table["arms"][f"{KEEP_ALL} at 1"],
            table["arms"][f"{FULL_IMAGE} at 1"],
            *records.at(table, rate),
        ]
        rows = [
            [
                arm["name"],
                f"{arm['tokens']:.0f} + {arm['newlines']:.0f}",
                *(md.cell(arm["tasks"][task]) for task in tasks),
                md.cell(arm["mean"]),
            ]
            for arm in arms
        ]
        lines += [
            f"### {md.whole(rate)} of the tokens",
            "",
            *md.table(("policy", "tokens", *tasks, "mean"), rows),
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
        f"Tasks of which too few remain are left out with them; what is left: {md.listed(tasks)}. Means over "
        "these tasks.",
        "",
    ]
    rates = records.rates(table)
    names = list(dict.fromkeys(arm["name"] for rate in rates for arm in records.at(table, rate)))
    rows = [["all tokens", *[md.cell(table["arms"][f"{KEEP_ALL} at 1"]["mean_without_easy"])] * len(rates)]]
    for name in names:
        cells = [table["arms"].get(f"{name} at {rate:g}") for rate in rates]
        rows.append([name, *(md.cell(cell["mean_without_easy"]) if cell else "" for cell in cells)])
    return [*lines, *md.table(("policy", *(f"{md.whole(rate)}" for rate in rates)), rows), ""]


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
    rates, cells = records.rates(table), table["differences"]
    names = [name for name in records.names(table) if name != "hired"]
    rows = []
    for name in names:
        own = [cells.get(f"{name} at {rate:g}") for rate in rates]
        rows.append([name, *(md.marked(cell["mean"]) if cell else "" for cell in own)])
    return [*lines, *md.table(("policy", *(f"{md.whole(rate)}" for rate in rates)), rows), ""]


def _tokens(table: Record, pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Tokens an image", ""]
    lines += md.picture(
        pictures, "tokens-an-image", "From the fewest to the most an image; the dot is the mean."
    )
    unused = [
        f"`{arm['name']}` at {md.whole(arm['rate'])} uses {md.whole(arm['budget_used'])} of its budget"
        for rate in records.rates(table)
        for arm in records.at(table, rate)
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
        *md.picture(pictures, "pareto-speed", "Mean over tasks against images/s."),
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
        f"HiRED at {md.whole(rate)} of the tokens with one decision changed, on {section['items']:,} "
        f"questions about {section['pictures']:,} pictures. Differences are in points of a hundred, "
        "bold where the interval leaves out zero. `hired` allocates by layer 0, selects by the feature "
        "layer, sums over heads, keeps original positions and closes the rows that keep a token.",
        "",
    ]
    lines += md.picture(pictures, "ablations", "Green: better than HiRED; red: worse; grey: not told apart.")
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
                md.cell(arm["mean"]),
                md.marked(difference["mean"]) if difference else "",
            ]
        )
    lines += [*md.table(("changed", "tokens", "mean over tasks", "less hired"), rows), ""]
    lines += md.picture(pictures, "alpha", "The full-image's share of the budget.")
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
            words = f", {md.points(difference)} against 0.5"
        lines += [
            f"The best alpha here is {best:g}{words}; in the paper (figure 6) it is {paper.BEST_ALPHA:g}.",
            "",
        ]
    head = ("the paper's table 5, LLaVA-NeXT-7B at 20 %", "the arm here", *paper.ABLATION_BENCHMARKS)
    theirs = [[title, arm, *map(str, values)] for arm, (title, values) in paper.TABLE_5.items()]
    return [*lines, *md.table(head, theirs), ""]


def _fastv(section: Record, pictures: Mapping[str, str]) -> list[str]:
    lines = [
        "## Dropping inside the language model",
        "",
        "FastV (arXiv 2403.06764) sends everything through the first K layers, ranks by the attention of the "
        "prompt's last token there, and drops what is below its budget from the layers above: it knows the "
        "question, and it pays for it. A layer's tokens are a mean over the layers of a prefill, newlines "
        f"included. {section['items']:,} questions about {section['pictures']:,} pictures, the same for all "
        "arms; differences are from `hired` at the same budget, whatever the cost.",
        "",
        *md.picture(pictures, "fastv", "Mean over tasks against the tokens that a layer sees."),
    ]
    rows = []
    for name, arm in section["arms"].items():
        difference = section["differences"].get(name)
        rows.append(
            [
                arm["name"],
                md.whole(arm["rate"]),
                f"{arm['tokens_a_layer']:.0f}",
                md.cell(arm["mean"]),
                md.marked(difference["mean"]) if difference else "",
            ]
        )
    head = ("arm", "budget", "tokens a layer", "mean over tasks", "less hired")
    return [*lines, *md.table(head, rows), ""]


def _beside(table: Record, other: Record) -> list[str]:
    """Another model's means and differences at the same budgets."""
    rates = records.rates(other)
    lines = [
        f"## The same of another model: {other['model']['name']}",
        "",
        f"Weights {other['model']['sha256'][:12]}, {other['items']:,} questions about {other['pictures']:,} "
        f"pictures; commit {other['commit']}. All tokens score "
        f"{md.percent(other['arms'][f'{KEEP_ALL} at 1']['mean'])}, the full-image alone "
        f"{md.percent(other['arms'][f'{FULL_IMAGE} at 1']['mean'])}. Means over tasks, and what they are "
        "above `hired` at the same budget.",
        "",
        *([f"    {other['model']['trained_by']}"] if other["model"].get("trained_by") else []),
        f"    {other['command']}",
        "",
        agreement(table["differences"], other["differences"]),
        "",
    ]
    rows = []
    for name in records.names(other):
        row = [name]
        for rate in rates:
            key = f"{name} at {rate:g}"
            mean = f"{100 * other['arms'][key]['mean'][0]:.1f}" if key in other["arms"] else ""
            difference = other["differences"].get(key)
            row.append(f"{mean} ({md.marked(difference['mean'])})" if difference else mean)
        rows.append(row)
    return [*lines, *md.table(("policy", *map(md.whole, rates)), rows), ""]


def _attention(section: Record, pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Attention", ""]
    shares = section["language_model"]
    if isinstance(shares, str):
        lines += [shares, ""]
    else:
        ours = ", ".join(f"{md.whole(float(share))} hold {md.whole(held)}" for share, held in shares.items())
        theirs = ", ".join(
            f"{md.whole(share)} hold {md.whole(held)}" for share, held in paper.FIGURE_2.items()
        )
        lines += [
            "What the last token of the prompt attends to among the visual tokens, all kept, a mean over "
            f"heads, layers and {section['pictures']} pictures: the top {ours}. The paper's figure 2: the "
            f"top {theirs}.",
            "",
        ]
        lines += md.picture(pictures, "attention-share", "Attention held by the most attended tokens.")
    rows = []
    for share, counts in section["by_partition"].items():
        if counts is not None:
            rows.append([f"here, top {md.whole(float(share))}", *(f"{count:.1f}" for count in counts)])
    for share, numbers in paper.TABLE_2.items():
        rows.append([f"the paper, top {md.whole(share)}", *map(str, numbers)])
    lines += [
        "Where the patches lie that CLS attends to most, over all partitions, in the "
        f"{section['of_grid']} pictures of two by two sub-images. Beside it the paper's table 2, of some "
        "2,880 tokens an image.",
        "",
        *md.table(("", *paper.PARTITIONS), rows),
        "",
    ]
    words = "CLS attention in the full-image, layer by layer; the last one is the feature layer."
    return [*lines, *md.picture(pictures, "attention-maps", words)]


def _paper() -> list[str]:
    rows = [[name, *(f"{value:g}" for value in values)] for name, values in paper.TABLE_3.items()]
    return [
        "## The paper's table 3",
        "",
        f"LLaVA-NeXT-7B on photographs and documents; {paper.SOURCE}. Theirs, not measured here; another "
        "model and other tasks, so levels do not compare.",
        "",
        *md.table(("", *paper.BENCHMARKS), rows),
        "",
    ]
