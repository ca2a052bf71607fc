"""Writes the README's figures from the committed results, so that they cannot go stale.

    python jobs/write_figures.py [--check]

With ``--check`` nothing is written, and the exit code is 1 where the README says anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from pipeline.benchmark.arms import ARMS

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
TRAINING = PROJECT / "hired" / "embedded" / "checkpoint" / "training.json"
BENCHMARK = PROJECT / "docs" / "results" / "benchmark-small.json"

# The ratios that the README shows, and where a benchmark's record has them.
RATIOS = {
    "images/s from bytes to captions, 20 % against keep-all": (
        "stages",
        "hired 20 % against keep-all, from bytes to captions",
    ),
    "time of the encoder with hired 20 %, against the plain tower in transformers": (
        "encoder",
        "against_the_plain_tower",
        "hired-20",
    ),
    "images/s of the job under Ray, start-up left out, against the bare loop": ("ray", "ray_against_bare"),
}

_BLOCK = "<!-- figures: {name} -->\n{table}\n<!-- end of figures -->"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = with_figures(old)
    if new == old:
        return 0
    if options.check:
        print("README.md is not what the results say; run `make docs`", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


def with_figures(readme: str) -> str:
    """The README with both of its tables as the results files have them now."""
    tables = {
        "embedded": embedded(json.loads(TRAINING.read_text(encoding="utf-8"))),
        "benchmark": benchmark(json.loads(BENCHMARK.read_text(encoding="utf-8"))),
    }
    for name, table in tables.items():
        block = _BLOCK.format(name=name, table=table)
        pattern = re.escape(f"<!-- figures: {name} -->") + r".*?<!-- end of figures -->"
        readme, count = re.subn(pattern, block.replace("\\", r"\\"), readme, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{README} must hold the block 'figures: {name}' once, not {count} times")
    return readme


def embedded(record: dict[str, Any]) -> str:
    """Held-out answers by task under three choices of tokens, and where CLS attention lies."""
    arms = record["exact_answers"]
    tasks = {
        "read": "what a sign says",
        "chart": "the value of a bar",
        "shape": "shape of a colour",
        "colour": "colour of a shape",
        "yes-no": "yes or no",
        "count": "how many",
        "place": "what is at a place",
        "describe": "the whole description, word for word",
    }
    lines = [
        "| right answers, word for word | questions | " + " | ".join(arms) + " |",
        "|---|---|" + "---|" * len(arms),
    ]
    for task, words in tasks.items():
        shares = (f"{arm[task]['share']:.1%}" if task in arm else "" for arm in arms.values())
        lines.append(f"| {words} | {arms['all tokens'][task]['of']} | " + " | ".join(shares) + " |")
    areas = record["cls_attention_against_ink_roc_auc"]
    layers = sorted({int(name.split()[1].rstrip(",")) for name in areas})
    lines += [
        "",
        "Area under the ROC curve of CLS attention against the painted ink, full-image and sub-images: "
        + "; ".join(
            f"layer {layer} ({use}) {areas[f'layer {layer}, full-image']} "
            f"and {areas[f'layer {layer}, sub-image']}"
            for layer, use in ((layers[0], "shares the budget out"), (layers[-1], "selects"))
        )
        + ".",
    ]
    return "\n".join(lines)


def benchmark(record: dict[str, Any]) -> str:
    """Images a second of every arm at its own best batch, and the ratios that the other sections found."""
    sections = record["sections"]
    engine = sections["engine"]["figures"][0]
    rate = {
        name: arm["own"]["images_per_s"]["median"]
        for name, arm in engine["arms"].items()
        if isinstance(arm, dict) and isinstance(arm["own"], dict)
    }
    lines = [
        "| encode and generate | images/s | against keep-all | batch | tokens in the prompt |",
        "|---|---|---|---|---|",
    ]
    for name, of_arm in rate.items():
        arm = engine["arms"][name]
        lines.append(
            f"| {ARMS[name].title} | {of_arm:g} | {of_arm / rate['keep-all']:.2f}x "
            f"| {arm['own']['batch']} | {arm['prompt_tokens']:g} |"
        )
    lines += ["", "| in the same model | measured |", "|---|---|"]
    lines += [f"| {what} | {ratio:.2f}x |" for what, ratio in _ratios(sections)]
    model, parameters = record["model"], f"{record['parameters'] / 1e6:.0f} million parameters"
    pages = (
        f"[All figures](docs/results/benchmark-{model}.md), and those of the "
        "[embedded model](docs/results/benchmark-embedded.md)"
    )
    lines += [
        "",
        f"The model `{model}` ({parameters} at random, 2,880 visual tokens an image) in {record['dtype']} on "
        f"{record['hardware']}, {engine['images']} images, {engine['max_new_tokens']} new tokens, medians of "
        f"interleaved repeats, by `{sections['engine']['command']}`. {pages}. LLaVA-NeXT-7B on a GPU: not "
        "measured.",
    ]
    return "\n".join(lines)


def _ratios(sections: dict[str, Any]) -> list[tuple[str, float]]:
    """What the sections that were measured compare."""
    found = []
    for what, (section, *path) in RATIOS.items():
        figure = sections.get(section, {}).get("figures")
        for step in path:
            figure = figure.get(step) if isinstance(figure, dict) else None
        if isinstance(figure, float | int):
            found.append((what, figure))
    return found


if __name__ == "__main__":
    sys.exit(main())
