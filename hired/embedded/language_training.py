"""Trains the language model to look things up among visual tokens: on the painter's truth, then on the tower.

The look-up is what takes the steps, not the seeing, so it is learned where seeing is free: ``Truth`` embeds
patch labels and no picture is drawn. Then the projector learns to say the same from the tower's features,
which takes minutes, and both train on together.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from hired.embedded import painter, supervision
from hired.embedded.optimisation import Named, Optimiser, elapsed
from hired.embedded.sequences import (
    IGNORED,
    Example,
    Picture,
    Pictures,
    Sequences,
    compose,
    lay_out,
    with_newlines,
)
from hired.embedded.tower_training import feature_layer, normalise

log = logging.getLogger(__name__)

LENGTH, BATCH, NUM_TEXTS = 256, 28, 5
FULL_LENGTH, FULL_BATCH = 880, 6  # every token of the largest canvas, and room for eight questions
FULL_FROM = 0.25


class Truth(nn.Module):
    """Embeds what the painter knows of a patch, as a perfect tower and projector would: [n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        places = 2 * supervision.PATCHES_PER_SIDE
        self.embed = nn.Linear(painter.NUM_WHATS + painter.NUM_TINTS + places, width)

    def forward(self, examples: Sequence[Example], unsure: float = 0.0) -> torch.Tensor:
        known = torch.cat([knowledge(example, unsure) for example in examples])
        return self.embed(known.to(self.embed.weight.device))  # type: ignore[no-any-return]


def knowledge(example: Example, unsure: float) -> torch.Tensor:
    """What a patch shows, whose colour it bears, and its row and column: [n, whats + tints + places].

    The full-image's print cannot be read, nor, by chance, a share ``unsure`` of the patches.
    """
    partition, patch = example.partition.numpy(), example.patch.numpy()
    side = supervision.PATCHES_PER_SIDE
    shown = (example.picture.whats[partition, patch] >= supervision.VISIBLE).astype(np.float32)
    unreadable = (partition == 0) | (np.random.default_rng().random(len(patch)) < unsure)
    prints = shown[:, painter.FIRST_GLYPH :]
    shown[:, painter.PLATE] = np.maximum(shown[:, painter.PLATE], unreadable * prints.max(-1))
    prints[unreadable] = 0
    tints = example.picture.tints[partition, patch, 1:]
    tint = np.where(tints.max(-1) >= supervision.VISIBLE, tints.argmax(-1) + 1, 0)
    where = np.eye(side)[patch // side], np.eye(side)[patch % side]
    return torch.from_numpy(
        np.concatenate([shown, np.eye(painter.NUM_TINTS)[tint], *where], -1).astype(np.float32)
    )


class Trainer:
    """The three steps of teaching one model, on one device."""

    def __init__(self, model: Any, tokenizer: Any, *, seed: int, save: Callable[[], None]) -> None:
        self.model, self.tokenizer, self.seed, self._save = model, tokenizer, seed, save
        self.device = next(model.parameters()).device
        self.truth = Truth(model.config.text_config.hidden_size).to(self.device)
        self.rng = random.Random(seed)
        self._prefix = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
        self._decode = torch.compile(decode_layers, dynamic=False)
        self._see = torch.compile(feature_layer, dynamic=False)

    def learn_from_truth(self, minutes: float, *, peak: float = 2e-3) -> None:
        """The language model and ``Truth``, on labels alone."""
        labelled = self._pictures(BATCH, drawn=False)
        self._learn("truth", minutes, peak, self.truth, labelled, lambda e: self.truth(e, unsure=0.07))

    def match_projector(self, minutes: float) -> None:
        """The projector alone: from the tower's features to what ``Truth`` says of the same patch."""
        projector = self.model.model.multi_modal_projector
        optimiser = Optimiser([Named("projector", projector)], peak=2e-3, warm_up_steps=50)
        seen = self._seen_pictures()
        for step, done in elapsed(minutes):
            examples = self._compose(next(seen), full=False)
            with torch.no_grad():
                wanted = self.truth(examples)
            loss = functional.mse_loss(projector(_features(examples, self.device)), wanted) / wanted.var()
            torch.autograd.backward(loss)
            optimiser.step(done)
            if step % 50 == 0:
                log.info("projector step %d, unexplained %.3f", step, loss)

    def learn_from_tower(self, minutes: float, *, peak: float = 1e-3) -> None:
        """The language model and the projector on the tower's features."""
        projector = self.model.model.multi_modal_projector
        self._learn(
            "tower", minutes, peak, Named("projector", projector), self._seen_pictures(),
            lambda examples: projector(_features(examples, self.device)),
        )  # fmt: skip

    def _learn(
        self,
        name: str,
        minutes: float,
        peak: float,
        source: nn.Module,
        pictures: Iterator[list[Picture]],
        visual: Callable[[list[Example]], torch.Tensor],
    ) -> None:
        """The language model and ``source``, on what ``visual`` makes of pictures.

        From ``FULL_FROM`` of the time on, every third batch keeps all tokens.
        """
        taught = [self.model.model.language_model, self.model.lm_head, _Newline(self.model), source]
        optimiser = Optimiser(taught, peak=peak, warm_up_steps=100)
        scores = {False: Score(), True: Score()}
        for step, done in elapsed(minutes):
            full = done > FULL_FROM and step % 3 == 0
            examples = self._compose(next(pictures)[: FULL_BATCH if full else BATCH], full=full)
            score = scores[full]
            score.add(*self._answer(examples, visual(examples), FULL_LENGTH if full else LENGTH))
            torch.autograd.backward(score.loss)
            optimiser.step(done)
            if step % 50 == 0:
                log.info("%s step %d: %s; all tokens: %s", name, step, scores[False], scores[True])
            if step % 500 == 0:
                self._save()

    def _pictures(self, batch_size: int, *, drawn: bool) -> Iterator[list[Picture]]:
        pictures = Pictures(self.rng.getrandbits(32), self.tokenizer, batch_size=batch_size, drawn=drawn)
        loader = DataLoader(
            pictures,
            batch_size=None,
            num_workers=1,
            prefetch_factor=8,
            collate_fn=_as_they_are,
            # A forked one would keep a copy of all that the trainer remembers at that time.
            multiprocessing_context="spawn",
        )
        return iter(loader)

    def _seen_pictures(self, new: int = 8, memory: int = 4000) -> Iterator[list[Picture]]:
        """Batches of pictures with the tower's features: ``new`` ones and some that were seen before."""
        drawn = self._pictures(new, drawn=True)
        remembered: deque[Picture] = deque(maxlen=memory)
        while True:
            pictures = next(drawn)
            pixels = [torch.from_numpy(p.pixels) for p in pictures]
            counts = [len(p) for p in pixels]
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                padded = functional.pad(torch.cat(pixels), (0, 0, 0, 0, 0, 0, 0, 5 * new - sum(counts)))
                hidden = self._see(self.model.model.vision_tower, normalise(padded.to(self.device)))
            features = torch.split(hidden[: sum(counts), 1:].half().cpu(), counts)
            fresh = [picture.seen(feature) for picture, feature in zip(pictures, features, strict=True)]
            remembered.extend(fresh)
            yield [*fresh, *self.rng.choices(remembered, k=BATCH - new)]

    def _compose(self, pictures: Sequence[Picture], *, full: bool) -> list[Example]:
        length, num_texts = (FULL_LENGTH, 8) if full else (LENGTH, NUM_TEXTS)
        return [compose(p, self.rng, length=length, num_texts=num_texts, full=full) for p in pictures]

    def _answer(
        self, examples: Sequence[Example], features: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, Sequences]:
        """Logits [answer tokens, vocabulary] where the sequences' targets ask for them."""
        model = self.model
        sequences = lay_out(examples, self._prefix, length, compact=self.rng.random() < 0.3)
        visual = with_newlines(examples, features.float(), model.model.image_newline)
        with torch.autocast(self.device.type, torch.bfloat16):
            embeddings = model.get_input_embeddings()(sequences.ids.to(self.device))
            embeddings = embeddings.masked_scatter(sequences.visual.to(self.device)[..., None], visual)
            mask = sequences.mask.to(self.device)[:, None]
            bias = torch.zeros(mask.shape, device=self.device).masked_fill(~mask, -1e4)
            hidden = self._decode(
                model.model.language_model, embeddings, bias, sequences.positions.to(self.device)
            )
            wanted = (sequences.targets[:, 1:] != IGNORED).to(self.device)
            return model.lm_head(hidden[:, :-1][wanted]), sequences


class Score:
    """The last loss, and running shares of wholly right answers by task (teacher forced)."""

    def __init__(self) -> None:
        self.loss = torch.tensor(0.0)
        self._right: dict[str, float] = {}

    def add(self, logits: torch.Tensor, sequences: Sequences) -> None:
        learned = sequences.targets != IGNORED
        targets, weights = (of[learned].to(logits.device) for of in (sequences.targets, sequences.weights))
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        self.loss = (losses * weights).sum() / weights.sum()
        right = torch.zeros(sequences.targets.shape, dtype=torch.bool)
        right[learned] = (logits.argmax(-1) == targets).cpu()
        by_task: dict[str, list[bool]] = defaultdict(list)
        for row, answer, task in sequences.answers:
            by_task[task].append(bool(right[row, answer].all()))
        for task, answers in by_task.items():
            share = float(np.mean(answers))
            self._right[task] = 0.95 * self._right.get(task, share) + 0.05 * share

    def __str__(self) -> str:
        tasks = ", ".join(f"{task} {share:.2f}" for task, share in sorted(self._right.items()))
        return f"loss {self.loss:.3f}, {tasks}"


def decode_layers(
    decoder: Any, embeddings: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The Llama stack on whole sequences with an attention bias of our own, [b, 1, length, length]."""
    rotary = decoder.rotary_emb(embeddings, position_ids=positions)
    hidden = embeddings
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
    return decoder.norm(hidden)  # type: ignore[no-any-return]


def _as_they_are(pictures: list[Picture]) -> list[Picture]:
    """No collation; a function with a name, since a spawned worker must unpickle it."""
    return pictures


def _features(examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """The tower's features of all kept patches: [sum of n, d]."""
    kept = [e.picture.features[e.partition, e.patch] for e in examples]  # type: ignore[index]
    return torch.cat(kept).to(device).float()


class _Newline(nn.Module):
    """The newline vector, which hangs on the model itself, as a module of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.newline = model.model.image_newline
