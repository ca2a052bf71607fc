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

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
TRAINING = PROJECT / "hired" / "embedded" / "checkpoint" / "training.json"
BENCHMARK = PROJECT / "docs" / "results" / "benchmark-embedded.json"

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
    """Images a second under each token budget."""
    arms = record["arms"]
    baseline = arms["keep-all"]["images_per_s"]
    lines = ["| token budget | images/s | against keep-all | tokens in the prompt |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {arm['images_per_s']} | {arm['images_per_s'] / baseline:.2f}x | {arm['prompt_tokens']} |"
        for name, arm in arms.items()
    ]
    lines += [
        "",
        f"The embedded model on {record['hardware']}, {record['images']} images in batches of "
        f"{record['batch_size']}, medians of interleaved repeats, by `{record['command']}` "
        "([all figures](docs/results/benchmark-embedded.md)). Real checkpoints on a GPU: not measured.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
