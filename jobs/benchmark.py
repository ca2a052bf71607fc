"""Captions the same images under several token budgets, taking turns in one run, and compares what it costs.

    python jobs/benchmark.py --input examples/scenes --output docs/results

Partitioning is done once, beforehand. Then every arm encodes and generates all images, arm after arm, and
again as often as ``--repeats`` says; the first round warms up and is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hired
from hired.devices import describe_hardware
from hired.types import Partitions

ARMS: dict[str, tuple[str, float]] = {
    "keep-all": ("keep-all", 1.0),
    "hired 40 %": ("hired", 0.4),
    "hired 20 %": ("hired", 0.2),
    "hired 10 %": ("hired", 0.1),
}


@dataclass(slots=True)
class Times:
    """Seconds of each repeat, and tokens an image."""

    encode_s: list[float] = field(default_factory=list)
    generate_s: list[float] = field(default_factory=list)
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    vlm = hired.load(options.model, device=options.device, dtype=options.dtype)
    images = _partitions(vlm, options.input, options.images)
    times = {name: Times() for name in ARMS}
    for repeat in range(options.repeats + 1):
        for name, (policy, rate) in ARMS.items():
            run(vlm, images, hired.Budget(rate=rate), policy, options, times[name] if repeat else Times())
    record = {
        "command": shlex.join(["python", "jobs/benchmark.py", *sys.argv[1:]]),
        "commit": _commit(),
        "hardware": describe_hardware(options.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": options.model,
        "dtype": options.dtype or "default",
        "threads": options.threads,
        "images": len(images),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "arms": {name: summary(of_arm, len(images)) for name, of_arm in times.items()},
    }
    stem = options.output / f"benchmark-{Path(options.model).name}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    stem.with_suffix(".md").write_text(page(record))
    print(page(record))
    return 0


def run(
    vlm: hired.VLM,
    images: Sequence[Partitions],
    budget: hired.Budget,
    policy: str,
    options: argparse.Namespace,
    times: Times,
) -> None:
    """One arm over all images, in batches; its seconds are added to ``times``."""
    batches = [images[i : i + options.batch_size] for i in range(0, len(images), options.batch_size)]
    start = _now(options.device)
    tokens = [vlm.encode(batch, budget=budget, policy=policy) for batch in batches]
    encoded = _now(options.device)
    captions = [
        caption
        for of_batch in tokens
        for caption in vlm.generate(of_batch, options.prompt, max_new_tokens=options.max_new_tokens)
    ]
    times.encode_s.append(encoded - start)
    times.generate_s.append(_now(options.device) - encoded)
    times.prompt_tokens = statistics.mean(caption.prompt_tokens for caption in captions)
    times.completion_tokens = statistics.mean(caption.completion_tokens for caption in captions)


def summary(times: Times, num_images: int) -> dict[str, Any]:
    """Medians over the repeats, with the slowest and the fastest beside them."""
    total = [encode + generate for encode, generate in zip(times.encode_s, times.generate_s, strict=True)]
    rates = sorted(num_images / seconds for seconds in total)
    return {
        "images_per_s": round(statistics.median(rates), 3),
        "images_per_s_spread": [round(rates[0], 3), round(rates[-1], 3)],
        "encode_s": round(statistics.median(times.encode_s), 3),
        "generate_s": round(statistics.median(times.generate_s), 3),
        "prompt_tokens": round(times.prompt_tokens, 1),
        "completion_tokens": round(times.completion_tokens, 1),
    }


def page(record: dict[str, Any]) -> str:
    """The record as a page of Markdown."""
    baseline = record["arms"]["keep-all"]["images_per_s"]
    rows = [
        f"| {name} | {arm['images_per_s']} ({' to '.join(map(str, arm['images_per_s_spread']))}) "
        f"| {arm['images_per_s'] / baseline:.2f}x | {arm['encode_s']} | {arm['generate_s']} "
        f"| {arm['prompt_tokens']} | {arm['completion_tokens']} |"
        for name, arm in record["arms"].items()
    ]
    lines = [
        f"# Token budgets side by side: {record['model']}",
        "",
        f"{record['images']} images, batches of {record['batch_size']}, at most {record['max_new_tokens']} "
        f"new tokens, dtype {record['dtype']}, {record['threads']} threads. {record['hardware']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; commit {record['commit']}.",
        "",
        f"    {record['command']}",
        "",
        "Medians of interleaved repeats; slowest and fastest in brackets. Partitioning is not in it.",
        "",
        "| arm | images/s | against keep-all | encode s | generate s | prompt tokens | new tokens |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _partitions(vlm: hired.VLM, folder: Path, count: int) -> list[Partitions]:
    """The first ``count`` readable images of a folder."""
    partitions = []
    for file in sorted(folder.iterdir()):
        try:
            partitions.append(vlm.partition(file.read_bytes()))
        except hired.ImageError:
            continue
    return partitions[:count]


def _now(device: str | None) -> float:
    if device and device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _commit() -> str:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, default=Path("examples/scenes"))
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
