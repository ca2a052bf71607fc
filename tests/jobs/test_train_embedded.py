"""The training job leaves a checkpoint that loads and a record of it, and goes on where it was broken off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import hired

JOB = Path(__file__).parents[2] / "jobs" / "train_embedded.py"


def train(folder: Path) -> None:
    moments = [f"--{stage}-minutes=0.03" for stage in ("tower", "truth", "projector", "join", "attention")]
    subprocess.run(
        [
            *(sys.executable, JOB, f"--output={folder / 'model'}", f"--work={folder / 'work'}"),
            *("--device=cpu", "--held-out=2", *moments),
        ],
        check=True,
        env=os.environ | {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(JOB.parents[1])},
        timeout=500,
    )


@pytest.mark.slow
def test_a_training_of_seconds_gives_a_checkpoint_that_loads_and_a_record(tmp_path: Path) -> None:
    train(tmp_path)
    vlm = hired.load(tmp_path / "model", device="cpu")
    tokens = vlm.encode([vlm.partition(Image.new("RGB", (400, 300), "teal"))], budget=hired.Budget(rate=0.1))
    [caption] = vlm.generate(tokens, ["Describe the image."], max_new_tokens=3)
    assert caption.completion_tokens > 0
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["exact_answers"]["all tokens"]["yes-no"]["of"] >= 2
    assert 0 <= record["cls_attention_against_ink_roc_auc"]["layer 0, full-image"] <= 1

    states = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    assert {file.name for file in states} == {"tower.pt", "truth.pt", "joined.pt", "attentive.pt"}
    train(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in states} == states
