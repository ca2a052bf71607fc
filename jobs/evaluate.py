"""Asks a model questions under many token budgets and policies, and says what each keeps of the answers.

    python jobs/evaluate.py --profile full --output docs/results/accuracy
    python jobs/evaluate.py --model FOLDER --tasks textvqa.parquet=textvqa --output results
    python jobs/evaluate.py --fidelity --input PHOTOS --output fidelity    # jobs/fidelity.py

Answers are kept below ``--work`` chunk by chunk, so a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from jobs import fidelity
from pipeline.evaluation.answers import Interrupted
from pipeline.evaluation.options import PROFILES, SECTIONS, Options
from pipeline.evaluation.run import run, write_page
from pipeline.flags import Told, add_fields, given

# What argparse is told of each option: how its text becomes a value, and what it means.
FLAGS: dict[str, Told] = {
    "model": ({}, "embedded, a checkpoint's folder, or a hub id"),
    "profile": ({"choices": tuple(PROFILES)}, "how much is asked, but for what the options below say"),
    "sections": ({"nargs": "+", "choices": SECTIONS}, "parts of the results"),
    "pictures": ({"type": int}, "how many pictures; more of them go on from fewer"),
    "questions": ({"type": int}, "of one task about one drawn scene at most"),
    "seed": ({"type": int}, "of the drawn pictures"),
    "tuning": ({"action": "store_true"}, "draw the pictures to tune on, which no test ever shows"),
    "tasks": ({"nargs": "+", "metavar": "FILE=METRIC"}, "parquet files to ask instead of drawn pictures"),
    "max_new_tokens": ({"type": int}, "tokens an answer to items of files that do not say"),
    "policies": ({"nargs": "+"}, "names, or module:Class; all of the project if not given"),
    "budgets": ({"nargs": "+", "type": float}, "shares of an image's tokens"),
    "alpha": ({"type": float}, "the full-image's share of the budget"),
    "random_seeds": ({"type": int}, "how often the policy random draws"),
    "ablation_budget": ({"type": float}, "share of the tokens at which decisions are changed one by one"),
    "ablation_pictures": ({"type": int}, "how many of the pictures the ablations are asked about"),
    "fastv_layers": (
        {"nargs": "+", "type": int},
        "numbers of layers that see all tokens in the comparison with FastV",
    ),
    "fastv_pictures": ({"type": int}, "how many of the pictures FastV is asked about, which is slow"),
    "attention_pictures": ({"type": int}, "how many of the pictures attention is read on"),
    "draws": ({"type": int}, "of the bootstrap"),
    "speed": ({"type": Path}, "a benchmark's record, to draw accuracy against images/s"),
    "beside": (
        {"nargs": "+", "type": Path},
        "records of the same evaluation of other models, to compare with",
    ),
    "device": ({}, "cpu or cuda; a GPU if there is one"),
    "dtype": ({}, "float32, bfloat16 or float16"),
    "actors": ({"type": int}, "workers; one a GPU, or one for --threads cores"),
    "threads": ({"type": int}, "CPU threads of a worker"),
    "chunk": ({"type": int}, "pictures that are committed together"),
    "work": ({"type": Path}, "where answers are kept while a run is not complete"),
    "output": ({"type": Path}, "folder of the page, its pictures, the record and the answers"),
    "write_tasks": ({"type": Path}, "write the drawn tasks to this folder as parquet files, and end"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--fidelity" in arguments:
        return fidelity.main([each for each in arguments if each != "--fidelity"])
    command = shlex.join(["python", "jobs/evaluate.py", *arguments])
    try:
        with redirect_stdout(sys.stderr):  # Ray prints its workers' words to stdout
            chosen, page_only = options(arguments)
            written = write_page(chosen.output) if page_only else run(chosen, command)
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    print(written)
    return 0


def options(arguments: Sequence[str]) -> tuple[Options, bool]:
    """What the flags say, and whether only the page is to be written anew; raises ConfigurationError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--page-only", action="store_true", help="write page and pictures anew from the record in --output"
    )
    add_fields(parser, Options, FLAGS)
    said = given(parser.parse_args(arguments))
    page_only = said.pop("page_only")
    return Options(**said), page_only


if __name__ == "__main__":
    sys.exit(main())
