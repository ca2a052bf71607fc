"""Trains the language model to look things up among visual tokens, first on the painter's truth, then on the tower.

The look-up is what takes the steps, not the seeing, so it is learned where seeing is free: ``Truth`` embeds the
patch labels themselves and no picture is drawn. The projector then learns to say the same from the tower's
features, and both train on. An image's questions share one sequence; a mask keeps each from seeing the others.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import IterableDataset

from hired.embedded import painter, supervision
from hired.embedded.questions import Question, ask
from hired.embedded.tower_training import random_size
from hired.geometry import best_canvas, real_patches
from hired.packing import NEWLINE, layout
from hired.types import Grid, Size, VisualTokens

IGNORED = -100
NUM_LOCATIONS = 2 * supervision.PATCHES_PER_SIDE
_WEIGHTS = {"describe": 0.5, "read": 3, "read-place": 2, "chart": 1, "count": 0.5, "yes-no": 2, "place": 0.7}


@dataclass(frozen=True, slots=True)
class Text:
    """One question and answer as token ids, and what to learn of them."""

    task: str
    ids: list[int]
    num_question: int


@dataclass(frozen=True, slots=True)
class Example:
    """One image's kept visual tokens in the language model's order, and some questions about it.

    ``partition`` and ``patch`` int64 [m] (-1 for a newline), ``slot`` int64 [m], ``num_full`` tokens before
    dropping; ``labels`` int32 [k + 1, side, side] and ``pixels`` uint8 [k + 1, side, side, 3], or None.
    """

    partition: torch.Tensor
    patch: torch.Tensor
    slot: torch.Tensor
    num_full: int
    whats: NDArray[np.int64]
    tints: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None
    texts: list[Text]


class Examples(IterableDataset[list[Example]]):
    """Endless batches of examples that each fit ``length`` tokens."""

    def __init__(
        self, seed: int, tokenizer: Any, *, batch_size: int, length: int, num_texts: int, pictures: bool, full: float
    ) -> None:
        self.seed, self.tokenizer, self.batch_size, self.length = seed, tokenizer, batch_size, length
        self.num_texts, self.pictures, self.full = num_texts, pictures, full

    def __iter__(self) -> Iterator[list[Example]]:
        rng = random.Random(self.seed)
        while True:
            yield [self._example(rng) for _ in range(self.batch_size)]

    def _example(self, rng: random.Random) -> Example:
        brush_type = painter.Brush if self.pictures else painter.LabelBrush
        size = random_size(rng)
        scene = painter.paint(rng, size, brush_type=brush_type)
        labels = supervision.cut_labels(scene.labels)
        pixels = supervision.cut_pixels(scene.image) if scene.image is not None else None
        whats, tints = supervision.patch_counts(labels)
        keep = self._keep(rng, whats, size)
        partition, patch = keep.nonzero(as_tuple=True)
        canvas = best_canvas(size, painter.PINPOINTS)
        grid = Grid(canvas.height // painter.SIDE, canvas.width // painter.SIDE)
        real = int(real_patches(size, grid, supervision.PATCHES_PER_SIDE).sum())
        tokens = VisualTokens(torch.empty(len(patch), 0), partition, patch, grid, size, real)
        packed = layout(tokens, supervision.PATCHES_PER_SIDE)
        newline = packed.source == NEWLINE
        return Example(
            partition=torch.where(newline, -1, partition[packed.source]),
            patch=torch.where(newline, -1, patch[packed.source]),
            slot=packed.slots,
            num_full=packed.num_full,
            whats=whats,
            tints=tints,
            pixels=pixels,
            texts=self._texts(rng, ask(scene, rng), self.length - 2 - len(packed)),
        )

    def _keep(self, rng: random.Random, whats: NDArray[np.int64], size: Size) -> torch.Tensor:
        """Some of the patches, as dropping would leave them: the things and a share of the background."""
        canvas = best_canvas(size, painter.PINPOINTS)
        grid = Grid(canvas.height // painter.SIDE, canvas.width // painter.SIDE)
        real = real_patches(size, grid, supervision.PATCHES_PER_SIDE)
        if rng.random() < self.full:
            return real
        ink = torch.from_numpy(whats[..., 1:].sum(-1) > 0)
        noise = torch.from_numpy(np.random.default_rng(rng.getrandbits(48)).random(real.shape))
        kept = real & ((ink & (noise < rng.choice((1.0, 1.0, 0.9)))) | (noise < rng.choice((0.02, 0.1))))
        kept[0, rng.randrange(kept.shape[1])] = True
        room = self.length - 2 - 120
        if int(kept.sum()) > room:
            order = noise.masked_fill(~kept, 2.0).flatten().argsort()[:room]
            kept = torch.zeros_like(kept).flatten().index_fill(0, order, True).view_as(kept)
        return kept

    def _texts(self, rng: random.Random, questions: Sequence[Question], room: int) -> list[Text]:
        """As many questions as there is room for, the harder tasks more often."""
        ranked = sorted(questions, key=lambda q: -(rng.random() ** (1 / _WEIGHTS.get(q.task, 1))))
        texts: list[Text] = []
        for question in ranked[: self.num_texts]:
            asked = self.tokenizer.encode(f"\n{question.text}<|assistant|>", add_special_tokens=False)
            answer = self.tokenizer.encode(question.answer, add_special_tokens=False)
            ids = [*asked, *answer, self.tokenizer.eos_token_id]
            if len(ids) <= room:
                texts.append(Text(question.task, ids, len(asked)))
                room -= len(ids)
        return texts


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch laid out: ``ids`` [b, length] (0 where a visual token goes), ``targets`` [b, length], ``positions``
    [b, length], ``mask`` bool [b, length, length], ``visual`` bool [b, length], ``answers`` row, start, stop, task."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    visual: torch.Tensor
    answers: list[tuple[int, int, int, str]]


def lay_out(examples: Sequence[Example], prefix: Sequence[int], length: int, *, compact: bool) -> Sequences:
    """Prefix, visual tokens and questions of each example, padded to ``length``.

    Segment 0 is what all questions see; padding is a segment that sees itself.
    """
    b, p = len(examples), len(prefix)
    ids = torch.zeros(b, length, dtype=torch.int64)
    targets = torch.full((b, length), IGNORED)
    positions = torch.zeros(b, length, dtype=torch.int64)
    visual = torch.zeros(b, length, dtype=torch.bool)
    segment = torch.full((b, length), -1)
    answers: list[tuple[int, int, int, str]] = []
    for row, example in enumerate(examples):
        m = len(example.slot)
        ids[row, :p] = torch.tensor(prefix)
        visual[row, p : p + m] = True
        segment[row, : p + m] = 0
        positions[row, :p] = torch.arange(p)
        positions[row, p : p + m] = p + (torch.arange(m) if compact else example.slot)
        text_start = p + (m if compact else example.num_full)
        at = p + m
        for number, text in enumerate(example.texts, start=1):
            n = len(text.ids)
            ids[row, at : at + n] = torch.tensor(text.ids)
            targets[row, at + text.num_question : at + n] = ids[row, at + text.num_question : at + n]
            positions[row, at : at + n] = text_start + torch.arange(n)
            segment[row, at : at + n] = number
            answers.append((row, at + text.num_question, at + n, text.task))
            at += n
    seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    mask = seen & torch.ones(length, length, dtype=torch.bool).tril()
    return Sequences(ids, targets, positions, mask, visual, answers)


class Truth(nn.Module):
    """Embeds what the painter knows of a patch, as a perfect tower would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(painter.NUM_WHATS + painter.NUM_TINTS + NUM_LOCATIONS, width)

    def forward(self, known: torch.Tensor) -> torch.Tensor:
        return self.embed(known)  # type: ignore[no-any-return]


def knowledge(example: Example, rng: np.random.Generator) -> torch.Tensor:
    """What a perfect tower knows of each kept patch, [m, whats + tints + locations], newlines left out.

    The full-image's print is unreadable, and some patches are not recognised.
    """
    partition = example.partition[example.partition >= 0].numpy()
    patch = example.patch[example.partition >= 0].numpy()
    side = supervision.PATCHES_PER_SIDE
    shown = (example.whats[partition, patch] >= 5).astype(np.float32)
    unreadable = (partition == 0) | (rng.random(len(patch)) < 0.07)
    prints = shown[:, painter.FIRST_GLYPH :]
    shown[:, painter.PLATE] = np.maximum(shown[:, painter.PLATE], unreadable * prints.max(-1))
    prints[unreadable] = 0
    tints = example.tints[partition, patch]
    tint = np.where(tints[:, 1:].max(-1) >= 5, tints[:, 1:].argmax(-1) + 1, 0)
    return torch.from_numpy(
        np.concatenate(
            [shown, np.eye(painter.NUM_TINTS)[tint], np.eye(side)[patch // side], np.eye(side)[patch % side]], axis=-1
        ).astype(np.float32)
    )


def visual_embeddings(examples: Sequence[Example], embedded: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """All examples' visual tokens one after the other, newlines put in: [sum of m, d]."""
    is_patch = torch.cat([example.partition >= 0 for example in examples]).to(embedded.device)
    out = newline.to(embedded.dtype).expand(len(is_patch), -1).clone()
    out[is_patch] = embedded
    return out


def answer_logits(model: Any, sequences: Sequences, visual: torch.Tensor, decoder: Any) -> torch.Tensor:
    """Logits [answer tokens, vocabulary] where ``sequences.targets`` asks for them."""
    device = visual.device
    embeddings = model.get_input_embeddings()(sequences.ids.to(device))
    embeddings = embeddings.masked_scatter(sequences.visual.to(device)[..., None], visual.to(embeddings.dtype))
    bias = torch.zeros(sequences.mask.shape, device=device).masked_fill(~sequences.mask.to(device), -1e4)
    hidden = decoder(model.model.language_model, embeddings, bias[:, None], sequences.positions.to(device))
    wanted = (sequences.targets != IGNORED).to(device)
    return model.lm_head(hidden[:, :-1][wanted[:, 1:]])  # type: ignore[no-any-return]


def decode_layers(decoder: Any, embeddings: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The Llama stack on whole sequences with an attention bias of our own, [b, 1, length, length]."""
    rotary = decoder.rotary_emb(embeddings, position_ids=positions)
    hidden = embeddings
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
    return decoder.norm(hidden)  # type: ignore[no-any-return]


def loss_and_accuracy(logits: torch.Tensor, sequences: Sequences) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean cross-entropy over answer tokens, and the share of wholly right answers by task (teacher forced)."""
    targets = sequences.targets[sequences.targets != IGNORED].to(logits.device)
    loss = F.cross_entropy(logits.float(), targets)
    right = torch.zeros(sequences.targets.shape, dtype=torch.bool)
    right[sequences.targets != IGNORED] = (logits.argmax(-1) == targets).cpu()
    by_task: dict[str, list[bool]] = defaultdict(list)
    for row, start, stop, task in sequences.answers:
        by_task[task].append(bool(right[row, start:stop].all()))
    return loss, {task: float(np.mean(answers)) for task, answers in sorted(by_task.items())}
