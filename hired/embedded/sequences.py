"""Training sequences: an image's visual tokens, then questions that see the image and not each other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from hired.embedded import painter, supervision
from hired.embedded.questions import ask
from hired.geometry import Tiling, real_patches
from hired.packing import NEWLINE, Layout, layout
from hired.types import Size, VisualTokens

IGNORED = -100
TILING = Tiling(painter.SIDE, supervision.PATCH, painter.PINPOINTS)

# Reading is the hardest and the point; long descriptions would drown the rest.
_WEIGHTS = {
    "read": 4.0,
    "read-place": 1.5,
    "chart": 3.0,
    "describe": 0.3,
    "count": 0.5,
    "place": 0.7,
}
# An answer's first token is the one that shows whether the right thing was found.
_FIRST_TOKEN_WEIGHT = 3.0


@dataclass(frozen=True, slots=True)
class Text:
    """A question and its answer as token ids; the first ``num_question`` are asked, the rest are learned."""

    task: str
    ids: list[int]
    num_question: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A painted scene as the trainer keeps it.

    ``whats`` uint8 and ``tints`` int64 [k + 1, patches, ...] count each patch's labels; ``pixels`` uint8
    [k + 1, side, side, 3] and ``features`` [k + 1, patches, d], where there are any.
    """

    size: Size
    whats: NDArray[np.uint8]
    tints: NDArray[np.int64]
    texts: list[Text]
    pixels: NDArray[np.uint8] | None = None
    features: torch.Tensor | None = None

    def seen(self, features: torch.Tensor) -> Picture:
        """The picture with the tower's features in the place of its pixels."""
        return replace(self, pixels=None, features=features)


class Pictures(IterableDataset[list[Picture]]):
    """Endless batches of scenes with all their questions; with ``drawn`` False only the labels are made."""

    def __init__(self, seed: int, tokenizer: Any, *, batch_size: int, drawn: bool) -> None:
        self.seed, self.tokenizer, self.batch_size, self.drawn = seed, tokenizer, batch_size, drawn

    def __iter__(self) -> Iterator[list[Picture]]:
        rng = random.Random(self.seed)
        while True:
            yield [self._picture(rng) for _ in range(self.batch_size)]

    def _picture(self, rng: random.Random) -> Picture:
        size = painter.random_size(rng)
        scene = painter.paint(rng, size, brush_type=painter.Brush if self.drawn else painter.LabelBrush)
        whats, tints = supervision.patch_counts(supervision.cut_labels(scene.labels))
        texts = [self._text(q.task, q.text, q.answer) for q in ask(scene, rng)]
        pixels = supervision.cut_pixels(scene.image) if self.drawn else None
        # Counts end at 64 pixels; thousands of pictures are remembered, and would take a megabyte each.
        return Picture(size, whats.astype(np.uint8), tints, texts, pixels)

    def _text(self, task: str, question: str, answer: str) -> Text:
        asked = self.tokenizer.encode(f"\n{question}<|assistant|>", add_special_tokens=False)
        said = self.tokenizer.encode(answer, add_special_tokens=False)
        return Text(task, [*asked, *said, self.tokenizer.eos_token_id], len(asked))


@dataclass(frozen=True, slots=True)
class Example:
    """A picture with some of its patches kept, some of its questions chosen, and the layout of the former.

    ``partition`` and ``patch`` int64 [n] name the kept patches, sorted.
    """

    picture: Picture
    partition: torch.Tensor
    patch: torch.Tensor
    layout: Layout
    texts: list[Text]


def compose(picture: Picture, rng: random.Random, *, length: int, num_texts: int, full: bool) -> Example:
    """An example of at most ``length`` tokens: all real patches, or what a dropping policy might leave."""
    grid = TILING.grid(picture.size)
    real = real_patches(picture.size, grid, TILING.patches_per_side)
    kept = real if full else _dropped(picture, real, rng, room=length - 120)
    partition, patch = kept.nonzero(as_tuple=True)
    tokens = VisualTokens(torch.empty(len(patch), 0), partition, patch, grid, picture.size, int(real.sum()))
    packed = layout(tokens, TILING.patches_per_side)
    texts: list[Text] = []
    room = length - len(packed) - 2
    for text in sorted(
        picture.texts, key=lambda t: rng.random() ** (1 / _WEIGHTS.get(t.task, 1.0)), reverse=True
    ):
        if len(texts) < num_texts and len(text.ids) <= room:
            texts.append(text)
            room -= len(text.ids)
    return Example(picture, partition, patch, packed, texts)


def _dropped(picture: Picture, real: torch.Tensor, rng: random.Random, room: int) -> torch.Tensor:
    """The patches that show things, less a few, and a share of the others; ``room`` at most.

    Print goes last: without it the questions about it would have no answer.
    """
    shown = torch.from_numpy(picture.whats >= supervision.VISIBLE)
    ink, legible = shown[..., 1:].any(-1), shown[..., painter.FIRST_GLYPH :].any(-1)
    legible[0] = False
    chance = torch.from_numpy(np.random.default_rng(rng.getrandbits(48)).random(real.shape))
    kept = real & ((ink & (chance < rng.choice((1.0, 1.0, 0.95)))) | (chance < rng.choice((0.02, 0.1, 0.3))))
    kept[0, rng.randrange(kept.shape[1])] = True
    rank = (chance + 1.0 * ~legible).masked_fill(~kept, 3.0).flatten().argsort()
    first = rank[: min(room, int(kept.sum()))]
    return torch.zeros_like(kept).flatten().index_fill(0, first, True).view_as(kept)


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch laid out to one length.

    ``ids`` int64 [b, length], 0 where a visual token goes; ``targets``, their ``weights``, ``positions`` and
    bool ``visual`` alike; ``mask`` bool [b, length, length]; the row, place and task of each answer.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    mask: torch.Tensor
    answers: list[tuple[int, slice, str]]


def lay_out(examples: Sequence[Example], prefix: Sequence[int], length: int, *, compact: bool) -> Sequences:
    """Prefix, visual tokens and questions of each example.

    A segment's tokens see themselves and segment 0, which all questions share; ``compact`` positions count
    the tokens that are there, the others the places that they have when all are kept.
    """
    b, p = len(examples), len(prefix)
    ids, positions = torch.zeros(2, b, length, dtype=torch.int64)
    targets = torch.full((b, length), IGNORED)
    weights = torch.ones(b, length)
    visual = torch.zeros(b, length, dtype=torch.bool)
    segment = torch.full((b, length), -1)
    answers = []
    for row, example in enumerate(examples):
        at = p + len(example.layout)
        ids[row, :p] = torch.tensor(prefix)
        visual[row, p:at] = True
        segment[row, :at] = 0
        positions[row, :p] = torch.arange(p)
        positions[row, p:at] = p + (torch.arange(at - p) if compact else example.layout.slots)
        question_start = at if compact else p + example.layout.num_full
        for number, text in enumerate(example.texts, start=1):
            whole, answer = slice(at, at + len(text.ids)), slice(at + text.num_question, at + len(text.ids))
            ids[row, whole] = torch.tensor(text.ids)
            targets[row, answer] = ids[row, answer]
            weights[row, answer.start] = _FIRST_TOKEN_WEIGHT
            positions[row, whole] = question_start + torch.arange(len(text.ids))
            segment[row, whole] = number
            answers.append((row, answer, text.task))
            at = whole.stop
    shared = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    mask = shared & torch.ones(length, length, dtype=torch.bool).tril()
    return Sequences(ids, targets, weights, positions, visual, mask, answers)


def with_newlines(examples: Sequence[Example], features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """The visual embeddings of all examples, one after the other, in the language model's order.

    ``features`` [sum of n, d] are the kept patches' in the examples' order.
    """
    patch = torch.cat([example.layout.source != NEWLINE for example in examples])
    offsets = np.cumsum([0, *(len(example.patch) for example in examples)])
    source = torch.cat([e.layout.source + int(o) for e, o in zip(examples, offsets[:-1], strict=True)])
    table = torch.cat([features, newline[None].to(features)])
    return table[torch.where(patch, source, len(features)).to(features.device)]
