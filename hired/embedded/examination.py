"""What the embedded model knows of scenes that it has never seen, asked through the public face.

Every sign carries a word that no training step has shown, so reading cannot be recall.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from sklearn.metrics import roc_auc_score

from hired.budget import Budget
from hired.embedded import painter, supervision
from hired.embedded.lexicon import held_out_text
from hired.embedded.questions import Question, ask
from hired.geometry import real_patches
from hired.types import VisualTokens

if TYPE_CHECKING:
    from hired.vlm import VLM

MAX_NEW_TOKENS = 96

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tally:
    """Right answers of all."""

    right: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else float("nan")

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.right + other.right, self.total + other.total)

    def with_answer(self, right: bool) -> Tally:
        return Tally(self.right + right, self.total + 1)


def held_out_scenes(count: int, seed: int) -> Iterator[painter.Scene]:
    """Scenes of random sizes whose signs say words that training never shows."""
    rng = random.Random(seed)
    for _ in range(count):
        yield painter.paint(rng, painter.random_size(rng), text=held_out_text)


def examine(
    vlm: VLM,
    scenes: Sequence[painter.Scene],
    *,
    seed: int,
    budget: Budget,
    policy: str,
    select: Callable[[VisualTokens], VisualTokens] = lambda tokens: tokens,
    tasks: frozenset[str] | None = None,
) -> dict[str, Tally]:
    """Exact answers by task. ``select`` may take away more tokens; ``tasks`` limits the questions."""
    rng = random.Random(seed)
    tallies: dict[str, Tally] = defaultdict(Tally)
    for some in _chunks(scenes, 8):
        tokens = vlm.encode([vlm.partition(scene.image) for scene in some], budget=budget, policy=policy)
        asked: list[tuple[VisualTokens, Question]] = [
            (select(of_scene), question)
            for of_scene, scene in zip(tokens, some, strict=True)
            for question in ask(scene, rng)
            if tasks is None or question.task in tasks
        ]
        for batch in _chunks(asked, 32):
            answers = vlm.generate(
                [t for t, _ in batch], [q.text for _, q in batch], max_new_tokens=MAX_NEW_TOKENS
            )
            for (_, question), answer in zip(batch, answers, strict=True):
                tallies[question.task] = tallies[question.task].with_answer(
                    answer.text.strip() == question.answer
                )
    return dict(sorted(tallies.items()))


def full_image_only(tokens: VisualTokens) -> VisualTokens:
    """The tokens of the full-image alone."""
    kept = tokens.partition == 0
    return dataclasses.replace(
        tokens, features=tokens.features[kept], partition=tokens.partition[kept], patch=tokens.patch[kept]
    )


def attention_against_ink(vlm: VLM, scenes: Sequence[painter.Scene]) -> dict[str, float]:
    """Area under the ROC curve of CLS attention, summed over heads, against the patches that show a thing.

    By layer, for full-images and sub-images apart: the mean over the partitions that hold both kinds of
    patch, padding left out. 0.5 is chance.
    """
    layers = range(vlm.encoder.feature_layer + 1)
    areas: dict[str, list[float]] = defaultdict(list)
    for scene in scenes:
        partitions = vlm.partition(scene.image)
        [maps] = vlm.encoder.cls_attention([partitions], layers=layers)
        shown = supervision.ink(supervision.cut_labels(scene.labels))
        real = real_patches(partitions.original_size, partitions.grid, supervision.PATCHES_PER_SIDE).numpy()
        for layer in layers:
            for i, (attention, ink, inside) in enumerate(zip(maps[layer].numpy(), shown, real, strict=True)):
                if 0 < ink[inside].sum() < inside.sum():
                    kind = "sub-image" if i else "full-image"
                    areas[f"layer {layer}, {kind}"].append(roc_auc_score(ink[inside], attention[inside]))
    return {name: float(np.mean(values)) for name, values in sorted(areas.items())}


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
