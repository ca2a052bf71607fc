"""Trains the CLIP tower on what the painter knows: each patch names what it shows, CLS what is there at all.

The CLS objective is why CLS attention means something: to list a partition's shapes and glyphs, CLS must look
at the patches that show them. Both losses read the feature layer, the last one that the model runs.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from hired.attention import Attention
from hired.embedded import painter, supervision
from hired.embedded.optimisation import Named, Optimiser, elapsed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Partitions uint8 [n, side, side, 3] and their targets."""

    pixels: torch.Tensor
    targets: supervision.Targets


class Sheets(IterableDataset[Batch]):
    """Endless batches of the same size: packed sheets, and whole scenes cut into partitions."""

    def __init__(self, seed: int, num_sheets: int, num_from_scenes: int) -> None:
        self.seed, self.num_sheets, self.num_from_scenes = seed, num_sheets, num_from_scenes

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        from_scenes = _scene_partitions(rng)
        while True:
            drawn = [(*supervision.sheet(rng), False) for _ in range(self.num_sheets)]
            drawn += itertools.islice(from_scenes, self.num_from_scenes)
            pixels, labels, whole = (np.stack(column) for column in zip(*drawn, strict=True))
            yield Batch(torch.from_numpy(pixels), supervision.targets(labels, whole))


def _scene_partitions(rng: random.Random) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32], bool]]:
    """Pixels, labels, and whether it is the full-image, one partition at a time."""
    while True:
        scene = painter.paint(rng, painter.random_size(rng))
        cut = zip(supervision.cut_pixels(scene.image), supervision.cut_labels(scene.labels), strict=True)
        for i, (pixels, labels) in enumerate(cut):
            yield pixels, labels, i == 0


def _drawn(seed: int, num_sheets: int, num_from_scenes: int) -> Iterator[Batch]:
    """The batches of ``Sheets``, drawn ahead in a process of their own."""
    sheets = Sheets(seed, num_sheets, num_from_scenes)
    return iter(DataLoader(sheets, batch_size=None, num_workers=1, prefetch_factor=8))


class Heads(nn.Module):
    """What the training asks of the tower and the shipped model leaves out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.what = nn.Linear(width, painter.NUM_WHATS)
        self.tint = nn.Linear(width, painter.NUM_TINTS)
        self.presence = nn.Linear(width, supervision.NUM_PRESENCES)
        nn.init.constant_(self.presence.bias, -2.0)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, side, side, 3] to [n, 3, side, side] in -1..1, as the checkpoint's processor says."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def feature_layer(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """hidden_states[-2] [n, 1 + patches, d] of the normalised pixels."""
    return hidden_state(tower, pixels, -2)


def hidden_state(tower: Any, pixels: torch.Tensor, index: int) -> torch.Tensor:
    """hidden_states[index] [n, 1 + patches, d] of the normalised pixels; ``index`` counts from the end."""
    layers = tower.encoder.layers
    hidden: torch.Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in layers[: len(layers) + 1 + index]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def tower_loss(
    heads: Heads, hidden: torch.Tensor, targets: supervision.Targets
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch losses and the CLS loss, each a mean."""
    hidden = hidden.float()
    patches, cls = hidden[:, 1:], hidden[:, 0]
    weight = targets.weight / targets.weight.sum()
    what = -(targets.what * functional.log_softmax(heads.what(patches), -1)).sum(-1)
    tint = functional.cross_entropy(heads.tint(patches).transpose(1, 2), targets.tint, reduction="none")
    presence = functional.binary_cross_entropy_with_logits(heads.presence(cls), targets.presence)
    return ((what + 0.5 * tint) * weight).sum(), presence


def train_tower(
    tower: nn.Module,
    *,
    minutes: float,
    seed: int,
    device: torch.device,
    save: Callable[[Heads], None],
    num_sheets: int = 20,
    num_from_scenes: int = 8,
    peak: float = 2e-3,
    reuse: int = 2,
) -> Heads:
    """Trains ``tower`` in place for so many minutes and returns its heads. ``save`` is called now and then.

    ``peak`` is the highest learning rate. Each batch is trained on ``reuse`` times, far apart: drawing costs
    as much as a step does on a CPU core.
    """
    torch.manual_seed(seed)
    heads = Heads(tower.config.hidden_size).to(device)  # type: ignore[union-attr,arg-type]
    optimiser = Optimiser([tower, heads], peak=peak)
    drawn = _drawn(seed, num_sheets, num_from_scenes)
    kept: deque[Batch] = deque(maxlen=400)
    rng = random.Random(seed)
    forward = torch.compile(feature_layer)
    for step, done in elapsed(minutes):
        fresh = step % reuse == 1
        if fresh:
            kept.append(next(drawn))
        batch = kept[-1] if fresh else rng.choice(kept)
        targets = supervision.Targets(
            *(getattr(batch.targets, f.name).to(device) for f in fields(batch.targets))
        )
        with torch.autocast(device.type, torch.bfloat16):
            hidden = forward(tower, normalise(batch.pixels.to(device)))
        patch_loss, cls_loss = tower_loss(heads, hidden, targets)
        torch.autograd.backward(patch_loss + 5 * cls_loss)
        optimiser.step(done)
        if step % 100 == 0:
            glyphs, tints = accuracy(heads, hidden, targets)
            log.info(
                "tower step %d: patches %.3f, cls %.4f, glyphs right %.3f, tints right %.3f",
                step, patch_loss, cls_loss, glyphs, tints,
            )  # fmt: skip
        if step % 500 == 0:
            save(heads)
    save(heads)
    return heads


def teach_attention(tower: Any, *, minutes: float, seed: int, device: torch.device) -> None:
    """CLS of the feature layer learns to look at what is shown; the patches' features stay as they are.

    By that layer CLS knows what there is, and its own objective no longer cares where it looks, while the
    choice of tokens does. The feature layer and the one below it are trained, in place.
    """
    torch.manual_seed(seed)
    learning = tower.encoder.layers[-3:-1]
    before = copy.deepcopy(learning)
    learning.requires_grad_(True)
    optimiser = Optimiser([Named("layers", learning)], peak=3e-4, warm_up_steps=50)
    drawn = _drawn(seed, num_sheets=4, num_from_scenes=24)
    for step, done in elapsed(minutes):
        batch = next(drawn)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                states = hidden_state(tower, normalise(batch.pixels.to(device)), -4)
                wanted = before[1](before[0](states, attention_mask=None), attention_mask=None).float()
            states = learning[0](states, attention_mask=None)
            from_cls = Attention.of(learning[1].self_attn, learning[1].layer_norm1(states)).from_cls()
            hidden = learning[1](states, attention_mask=None).float()
        drift = functional.mse_loss(hidden[:, 1:], wanted[:, 1:]) / wanted[:, 1:].var()
        missed = attention_loss(from_cls, worth(batch.targets).to(device))
        torch.autograd.backward(10 * drift + missed)
        optimiser.step(done)
        if step % 50 == 0:
            log.info("attention step %d: missed %.3f, features moved by %.4f", step, missed, drift)


def worth(targets: supervision.Targets) -> torch.Tensor:
    """What a look at each patch is worth, ``[n, patches]``: print most, other things a quarter, nothing none.

    No two patches of a word can stand for each other, and many of a shape can.
    """
    shown = targets.what[..., painter.BACKGROUND] == 0
    has_print = targets.what[..., painter.FIRST_GLYPH :].sum(-1) > 0
    return shown * torch.where(has_print, 1.0, 0.25)


def attention_loss(from_cls: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """How far CLS attention ``[n, patches]`` is from looking where it is worth while.

    The Kullback-Leibler divergence, a mean over the partitions that show anything.
    """
    some = worth.sum(-1) > 0
    looked, wanted = (of[some] / of[some].sum(-1, keepdim=True) for of in (from_cls, worth))
    return functional.kl_div(looked.log(), wanted, reduction="batchmean")


@torch.no_grad()
def accuracy(heads: Heads, hidden: torch.Tensor, targets: supervision.Targets) -> tuple[float, float]:
    """How often the likeliest glyph, with its index in the word, is in the patch; and the likeliest tint."""
    legible = (targets.weight == 1) & (targets.what[..., painter.FIRST_GLYPH :].sum(-1) > 0)
    patches = hidden[:, 1:].float()
    best = heads.what(patches).argmax(-1, keepdim=True)
    right = targets.what.gather(-1, best)[..., 0] > 0
    tint = heads.tint(patches).argmax(-1) == targets.tint
    return right[legible].float().mean().item(), tint[legible].float().mean().item()
