"""Trains the embedded model from nothing, examines it on scenes that it has never seen, and saves it.

    python jobs/train_embedded.py --output build/embedded

The stages leave their state in ``--work``; a run that was broken off goes on from the last whole stage.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import hired
from hired.devices import describe_hardware
from hired.embedded import examination
from hired.embedded.checkpoint import TRAINING
from hired.embedded.examination import Tally
from hired.embedded.training import Plan, train

log = logging.getLogger(__name__)


def main() -> int:
    options = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    plan = Plan(
        folder=options.work,
        seed=options.seed,
        device=options.device,
        threads=options.threads,
        initial=options.initial,
        peak=options.peak,
        tower_minutes=options.tower_minutes,
        truth_minutes=options.truth_minutes,
        projector_minutes=options.projector_minutes,
        join_minutes=options.join_minutes,
        attention_minutes=options.attention_minutes,
    )
    start = time.monotonic()
    train(plan, options.output)
    record = {
        "command": shlex.join(["python", "jobs/train_embedded.py", *sys.argv[1:]]),
        "seed": options.seed,
        "hours": round((time.monotonic() - start) / 3600, 2),
        "hardware": describe_hardware(options.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        **examine(options.output, options.held_out, options.seed),
    }
    (options.output / TRAINING).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0


def examine(folder: Path, num_scenes: int, seed: int) -> dict[str, Any]:
    """The held-out scores that are recorded beside the weights."""
    vlm = hired.load(folder)
    scenes = list(examination.held_out_scenes(num_scenes, seed=1_000_003 + seed))
    everything = examination.examine(vlm, scenes, seed=seed, budget=hired.Budget(rate=1.0), policy="keep-all")
    reading = frozenset({"read", "read-place", "chart"})
    full_image = examination.examine(
        vlm,
        scenes,
        seed=seed,
        budget=hired.Budget(rate=1.0),
        policy="keep-all",
        select=examination.full_image_only,
        tasks=reading,
    )
    fifth = examination.examine(vlm, scenes, seed=seed, budget=hired.Budget(rate=0.2), policy="hired")
    return {
        "held_out_scenes": num_scenes,
        "exact_answers": {
            "all tokens": _shares(everything),
            "full-image alone": _shares(full_image),
            "hired, a fifth of the tokens": _shares(fifth),
        },
        "cls_attention_against_ink_roc_auc": {
            name: round(area, 3)
            for name, area in examination.attention_against_ink(vlm, scenes[:100]).items()
        },
    }


def _shares(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {
        task: {"share": round(t.share, 4), "right": t.right, "of": t.total} for task, t in tallies.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--work", type=Path, default=Path("build/embedded-work"), help="folder of the stages' state"
    )
    parser.add_argument("--initial", type=Path, help="checkpoint to go on from (default: random weights)")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--tower-minutes", type=float, default=89)
    parser.add_argument("--truth-minutes", type=float, default=58, help="runs beside the tower")
    parser.add_argument("--projector-minutes", type=float, default=3)
    parser.add_argument("--join-minutes", type=float, default=33)
    parser.add_argument("--attention-minutes", type=float, default=5)
    parser.add_argument("--held-out", type=int, default=200, help="scenes that the scores are taken on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
