"""The embedded model's training from nothing: four stages that leave their state in a folder.

The tower learns to see and the language model to look up at the same time, each in a process of its own;
then they are joined, and CLS is taught where to look.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hired.embedded import checkpoint
from hired.embedded.language_training import Trainer
from hired.embedded.tokenisation import build_tokenizer
from hired.embedded.tower_training import Heads, teach_attention, train_tower

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the state goes, what it starts from, how long each stage lasts, and on what it runs.

    ``initial`` is a checkpoint of the embedded model to go on from; None is random weights. ``peak`` is the
    highest learning rate; the last stage takes half of it.
    """

    folder: Path
    seed: int
    device: str
    threads: int
    initial: Path | None
    peak: float
    tower_minutes: float
    truth_minutes: float
    projector_minutes: float
    join_minutes: float
    attention_minutes: float

    @property
    def tower_file(self) -> Path:
        return self.folder / "tower.pt"

    @property
    def truth_file(self) -> Path:
        return self.folder / "truth.pt"

    @property
    def joined_file(self) -> Path:
        return self.folder / "joined.pt"

    @property
    def attentive_file(self) -> Path:
        return self.folder / "attentive.pt"


def train(plan: Plan, output: Path) -> None:
    """Runs the stages whose state is not there yet and saves the checkpoint to ``output``."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    apart = [
        (stage, file)
        for stage, file in ((tower_stage, plan.tower_file), (truth_stage, plan.truth_file))
        if not file.exists()
    ]
    with ProcessPoolExecutor(max(1, len(apart)), mp_context=get_context("spawn")) as processes:
        for done in [processes.submit(stage, plan) for stage, _ in apart]:
            done.result()
    if not plan.joined_file.exists():
        join_stage(plan)
    if not plan.attentive_file.exists():
        attention_stage(plan)
    tokenizer = build_tokenizer()
    model = checkpoint.new_model(tokenizer, seed=plan.seed)
    model.load_state_dict(torch.load(plan.attentive_file, map_location="cpu"))
    checkpoint.save(model, tokenizer, output)


def tower_stage(plan: Plan) -> None:
    """The tower alone, on pixels."""
    _prepare(plan)
    tower = _initial_model(plan).model.vision_tower
    draft = plan.tower_file.with_suffix(".draft")

    def save(heads: Heads) -> None:
        torch.save({"tower": tower.state_dict(), "heads": heads.state_dict()}, draft)

    train_tower(
        tower,
        minutes=plan.tower_minutes,
        seed=plan.seed,
        device=torch.device(plan.device),
        save=save,
        peak=plan.peak,
    )
    draft.rename(plan.tower_file)


def truth_stage(plan: Plan) -> None:
    """The language model alone, on the painter's labels."""
    _prepare(plan)
    model = _initial_model(plan)
    draft = plan.truth_file.with_suffix(".draft")

    def save() -> None:
        torch.save({"model": model.state_dict(), "truth": trainer.truth.state_dict()}, draft)

    trainer = Trainer(model, build_tokenizer(), seed=plan.seed, save=save)
    trainer.learn_from_truth(plan.truth_minutes, peak=plan.peak)
    save()
    draft.rename(plan.truth_file)


def join_stage(plan: Plan) -> None:
    """The projector between the two, then language model and projector together; the tower stays as it is."""
    _prepare(plan)
    model = _initial_model(plan)
    draft = plan.joined_file.with_suffix(".draft")
    trainer = Trainer(
        model, build_tokenizer(), seed=plan.seed + 1, save=lambda: torch.save(model.state_dict(), draft)
    )
    truth = torch.load(plan.truth_file, map_location=plan.device)
    model.load_state_dict(truth["model"])
    trainer.truth.load_state_dict(truth["truth"])
    model.model.vision_tower.load_state_dict(torch.load(plan.tower_file, map_location=plan.device)["tower"])
    model.model.vision_tower.requires_grad_(False)
    trainer.match_projector(plan.projector_minutes)
    trainer.learn_from_tower(plan.join_minutes, peak=plan.peak / 2)
    torch.save(model.state_dict(), draft)
    draft.rename(plan.joined_file)


def attention_stage(plan: Plan) -> None:
    """Where CLS looks in the feature layer, last of all; nothing else changes."""
    _prepare(plan)
    model = _initial_model(plan)
    model.load_state_dict(torch.load(plan.joined_file, map_location=plan.device))
    teach_attention(
        model.model.vision_tower,
        minutes=plan.attention_minutes,
        seed=plan.seed,
        device=torch.device(plan.device),
    )
    draft = plan.attentive_file.with_suffix(".draft")
    torch.save(model.state_dict(), draft)
    draft.rename(plan.attentive_file)


def _initial_model(plan: Plan) -> Any:
    """The model that the plan starts from, on its device."""
    model = checkpoint.new_model(build_tokenizer(), seed=plan.seed)
    if plan.initial is not None:
        model.load_state_dict(checkpoint.weights(plan.initial))
    return model.to(plan.device)


def _prepare(plan: Plan) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(plan.threads)
    _give_back_large_blocks()


def _give_back_large_blocks() -> None:
    """Tells glibc to return every freed block above a megabyte to the system.

    By default it learns to keep blocks of up to 32 MB. A step's activations then leave holes between the
    pictures that are remembered, which the next step's do not fit: 4 MB a picture, of which it is half a one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_THRESHOLD, 2**20)
