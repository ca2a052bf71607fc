"""What the painter's pixel labels say about partitions and patches: the targets the tower is trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hired.embedded import painter
from hired.embedded.lexicon import COLOURS, GLYPHS, SHAPES, training_text
from hired.geometry import Tiling, best_canvas, fit
from hired.partitioning import partition
from hired.types import Size

PATCH = 16
PATCHES_PER_SIDE = painter.SIDE // PATCH
NUM_PRESENCES = len(SHAPES) * len(COLOURS) + len(GLYPHS) + len(COLOURS)

_STRIDE = 2  # every second pixel is enough to say what a patch shows
VISIBLE = 5  # of a patch's 64 looked-at pixels


@dataclass(frozen=True, slots=True)
class Targets:
    """``what`` float32 [n, patches, NUM_WHATS], each row a distribution; ``tint`` int64 [n, patches];
    ``weight`` float32 [n, patches]; ``presence`` float32 [n, NUM_PRESENCES].
    """

    what: torch.Tensor
    tint: torch.Tensor
    weight: torch.Tensor
    presence: torch.Tensor


def cut_labels(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """The labels of a scene's partitions, full-image first: [k + 1, side, side]. As ``hired.partitioning``
    cuts pixels, but no label is ever a mixture of two.
    """
    side = painter.SIDE
    size = Size(*labels.shape)
    canvas = best_canvas(size, painter.PINPOINTS)
    content = fit(size, canvas)
    marks = Image.fromarray(labels, mode="I")
    padded = np.zeros((canvas.height, canvas.width), np.int32)
    inside = np.s_[content.top : content.bottom, content.left : content.right]
    padded[inside] = np.asarray(marks.resize((content.width, content.height), Image.Resampling.NEAREST))
    tiles = padded.reshape(canvas.height // side, side, -1, side).swapaxes(1, 2).reshape(-1, side, side)
    full_image = np.asarray(marks.resize((side, side), Image.Resampling.NEAREST))
    return np.concatenate([full_image[None], tiles])


def cut_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """A picture's partitions as ``hired.partitioning`` cuts them: [k + 1, side, side, 3]."""
    tiling = Tiling(painter.SIDE, PATCH, painter.PINPOINTS)
    return partition(image, tiling).pixels


def patch_counts(labels: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many looked-at pixels of each patch bear each what and each tint: [n, patches, ...] twice."""
    n, side = len(labels), PATCHES_PER_SIDE
    looked = labels[:, ::_STRIDE, ::_STRIDE]
    step = PATCH // _STRIDE
    looked = looked.reshape(n, side, step, side, step).transpose(0, 1, 3, 2, 4).reshape(n * side * side, -1)
    rows = np.arange(len(looked))[:, None]
    what, tint = looked // painter.NUM_TINTS, looked % painter.NUM_TINTS
    whats = np.bincount((rows * painter.NUM_WHATS + what).ravel(), minlength=len(looked) * painter.NUM_WHATS)
    # A plate's own colour yields to the ink on it, so that a value's patch names its bar and not the panel.
    weight = np.where(what == painter.PLATE, 1, 64)
    tints = np.bincount(
        (rows * painter.NUM_TINTS + tint).ravel(), weight.ravel(), minlength=len(looked) * painter.NUM_TINTS
    )
    return whats.reshape(n, side * side, -1), tints.reshape(n, side * side, -1)


def ink(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which patches show a thing: [n, patches]."""
    whats, _ = patch_counts(labels)
    shown: NDArray[np.bool_] = whats[..., 1:].sum(-1) >= VISIBLE
    return shown


def targets(labels: NDArray[np.int32], whole: NDArray[np.bool_]) -> Targets:
    """What each patch shows and each partition holds. ``whole`` [n] marks full-images: their print is too
    small to read, so it weighs little.
    """
    whats, tints = patch_counts(labels)
    visible = (whats >= VISIBLE).astype(np.float32)  # not by area: a thin letter is as much of its word
    things = visible.copy()
    things[..., : painter.BAR] = 0
    has_thing = things.sum(-1) > 0
    has_plate = ~has_thing & (visible[..., painter.PLATE] > 0)
    what = things
    what[..., painter.PLATE] = has_plate
    what[..., painter.BACKGROUND] = ~has_thing & ~has_plate
    what /= what.sum(-1, keepdims=True)
    shown = has_thing | has_plate
    tint = np.where(shown, tints[..., 1:].argmax(-1) + 1, 0)
    has_print = visible[..., painter.FIRST_GLYPH :].sum(-1) > 0
    weight = np.where(
        has_thing, np.where(has_print & whole[:, None], 0.25, 1.0), np.where(has_plate, 0.3, 0.05)
    )
    return Targets(
        what=torch.from_numpy(what),
        tint=torch.from_numpy(tint),
        weight=torch.from_numpy(weight.astype(np.float32)),
        presence=torch.from_numpy(_presence(labels)),
    )


def _presence(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Which coloured shapes, glyphs and sign colours a partition holds: [n, NUM_PRESENCES]."""
    out = np.zeros((len(labels), NUM_PRESENCES), np.float32)
    colours, glyphs = len(COLOURS), len(GLYPHS)
    for row, one in zip(out, labels, strict=True):
        counts = np.bincount(one[::_STRIDE, ::_STRIDE].ravel())
        for label in np.flatnonzero(counts >= 2 * VISIBLE):
            what, tint = divmod(int(label), painter.NUM_TINTS)
            if what >= painter.FIRST_GLYPH:
                row[len(SHAPES) * colours + (what - painter.FIRST_GLYPH) % glyphs] = 1
            elif what >= painter.FIRST_SHAPE:
                row[(what - painter.FIRST_SHAPE) * colours + tint - 1] = 1
            elif what == painter.PLATE:
                row[len(SHAPES) * colours + glyphs + tint - 1] = 1
    return out


def sheet(rng: random.Random) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A partition packed with signs and shapes, ten times a scene's, and its labels [side, side]."""
    side = painter.SIDE
    brush = painter.Brush(Size(side, side), rng.getrandbits(48))
    y = rng.uniform(0, 12)
    while y < side - 24:
        row = rng.choices((_row_of_signs, _row_of_shapes, _row_of_charts), (8, 2, 1))[0]
        y += row(brush, rng, y)
        y += rng.uniform(1, 8)
    return np.asarray(brush.image), brush.labels


def _row_of_shapes(brush: painter.LabelBrush, rng: random.Random, y: float) -> float:
    extent = rng.uniform(24, 70)
    x = rng.uniform(-12, 20)
    while x < painter.SIDE - 12:
        brush.shape(rng.choice(SHAPES), rng.choice(sorted(COLOURS)), (x, y, x + extent, y + extent))
        x += extent + rng.uniform(3, 20)
    return extent


def _row_of_signs(brush: painter.LabelBrush, rng: random.Random, y: float) -> float:
    font = painter._font(rng.choice(painter._FONTS), round(rng.uniform(14, 24)))
    pad = rng.uniform(2, 8)
    cap = 0.74 * font.size
    x = rng.uniform(0, 16)
    while True:
        text, colour = training_text(rng), rng.choice(sorted(COLOURS))
        width = font.getlength(text) + 2 * pad
        if x + width > painter.SIDE:
            return cap + 2 * pad
        painter.draw_sign(brush, (x, y), text, colour, font, pad)
        x += width + rng.uniform(1, 14)


def _row_of_charts(brush: painter.LabelBrush, rng: random.Random, y: float) -> float:
    x, height = rng.uniform(0, 16), 0.0
    while True:
        chart = painter.random_chart(rng, 1.0)
        if x + chart.width > painter.SIDE or y + chart.height > painter.SIDE:
            return height
        painter.draw_chart(brush, (x, y), chart)
        x += chart.width + rng.uniform(2, 14)
        height = max(height, chart.height)
