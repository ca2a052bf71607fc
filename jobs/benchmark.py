"""Measures what dropping tokens is worth: several arms side by side, into one record and one page.

    python jobs/benchmark.py --model small --output docs/results
    python jobs/benchmark.py --model 7b --images 320 --memory-cap-gib 16 24 --output docs/results

Models: ``embedded``, a checkpoint's folder or hub id, or random weights of a known shape, made on first use:
``small`` for a CPU, ``7b`` as LLaVA-NeXT-7B for a GPU, ``toy`` for tests. ``--sections`` measures a part
alone; ``--add`` adds it to the record that is there.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from pipeline.benchmark.arms import ARMS
from pipeline.benchmark.pictures import ASPECTS
from pipeline.benchmark.record import run
from pipeline.benchmark.subject import BATCHINGS, SECTIONS, Options
from pipeline.flags import Told, add_fields, given

# What argparse is told of each option: how its text becomes a value, and what it means.
FLAGS: dict[str, Told] = {
    "model": ({}, "embedded, small, 7b, toy, a checkpoint's folder, or a hub id"),
    "sections": ({"nargs": "+", "choices": SECTIONS}, "what to measure"),
    "arms": ({"nargs": "+", "choices": tuple(ARMS)}, "who takes part; all if not given"),
    "batchings": (
        {"nargs": "+", "choices": BATCHINGS},
        "the batch that all arms share, or each arm's own best; both if not said",
    ),
    "input": ({"type": Path}, "folder of images; without one they are drawn"),
    "images": ({"type": int}, "how many images; those of a folder are repeated"),
    "aspect": ({"choices": tuple(ASPECTS)}, "of drawn images"),
    "prompt": ({}, "what every image is asked"),
    "max_new_tokens": ({"type": int}, "tokens an answer"),
    "batch_size": ({"type": int}, "the batch that all arms share, and that of the job under Ray"),
    "encode_batch_size": ({"type": int}, "images a call of the encoder"),
    "baseline_batches": ({"nargs": "+", "type": int}, "batches among which generate's best is searched"),
    "latency_images": ({"type": int}, "images a trial of the section latency"),
    "memory_cap_gib": ({"nargs": "+", "type": float}, "smaller cards to imitate besides"),
    "ray_options": ({"nargs": "+", "metavar": "KEY=VALUE"}, "options of the job under Ray"),
    "repeats": ({"type": int}, "rounds, without the one that warms up"),
    "device": ({}, "cpu, cuda or cuda:N; a GPU if there is one"),
    "dtype": ({}, "float32, bfloat16 or float16"),
    "compile": ({"action": "store_true"}, "compile the encoder's layers"),
    "threads": ({"type": int}, "CPU threads of every arm"),
    "cache": ({"type": Path}, "where checkpoints of random weights are kept"),
    "output": ({"type": Path}, "folder of the record and its page"),
    "add": ({"action": "store_true"}, "add the sections to the record that is there"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "jobs/benchmark.py", *arguments])
    try:
        page = run(options(arguments), command)
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    print(page.read_text(encoding="utf-8"))
    return 0


def options(arguments: Sequence[str]) -> Options:
    """The options that the flags say; raises ConfigurationError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_fields(parser, Options, FLAGS)
    return Options(**given(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
