"""The painted world: what it says of itself is so."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hired.embedded import painter, supervision
from hired.embedded.lexicon import (
    COLOURS,
    GLYPHS,
    MAX_GLYPHS,
    SEEN_WORDS,
    SHAPES,
    UNSEEN_WORDS,
    held_out_text,
)
from hired.geometry import best_canvas, fit
from hired.types import Size

SEEDS = range(12)


def scene(seed: int) -> painter.Scene:
    rng = random.Random(seed)
    return painter.paint(rng, painter.random_size(rng), text=held_out_text)


def test_no_word_is_both_learned_and_held_out() -> None:
    assert not set(SEEN_WORDS) & set(UNSEEN_WORDS)
    assert len(UNSEEN_WORDS) > 100
    assert all(len(word) <= MAX_GLYPHS and set(word) <= set(GLYPHS) for word in (*SEEN_WORDS, *UNSEEN_WORDS))


def test_a_seed_always_paints_the_same_scene() -> None:
    first, second = scene(3), scene(3)
    assert first.things == second.things
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_label_brush_marks_what_the_painting_brush_marks(seed: int) -> None:
    size = painter.random_size(random.Random(seed))
    painted = painter.paint(random.Random(seed), size)
    labelled = painter.paint(random.Random(seed), size, brush_type=painter.LabelBrush)
    assert labelled.things == painted.things
    assert np.array_equal(labelled.labels, painted.labels)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_thing_has_a_place_of_its_own_and_pixels_of_its_own(seed: int) -> None:
    painted = scene(seed)
    places = [thing.place for thing in painted.things if thing.kind != "bar"]
    assert len(places) == len(set(places))
    whats, tints = np.divmod(painted.labels, painter.NUM_TINTS)
    for thing in painted.of_kind("shape"):
        shown = (whats == painter.FIRST_SHAPE + SHAPES.index(thing.name)) & (
            tints == 1 + list(COLOURS).index(thing.colour)
        )
        assert shown.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_signs_glyphs_are_marked_in_their_order(seed: int) -> None:
    painted = scene(seed)
    whats, tints = np.divmod(painted.labels, painter.NUM_TINTS)
    for sign in painted.of_kind("sign"):
        own = tints == 1 + list(COLOURS).index(sign.colour)
        columns = []
        for index, glyph in enumerate(sign.text):
            _, xs = np.nonzero(own & (whats == painter.glyph_label(index, glyph)))
            columns.append(xs.mean())
        assert columns == sorted(columns)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_print_lies_across_the_line_between_two_sub_images(seed: int) -> None:
    painted = scene(seed)
    size = Size(painted.image.height, painted.image.width)
    canvas = best_canvas(size, painter.PINPOINTS)
    content = fit(size, canvas)
    unit = size.width / content.width
    whats, tints = np.divmod(painted.labels, painter.NUM_TINTS)
    for sign in painted.of_kind("sign"):
        own = (tints == 1 + list(COLOURS).index(sign.colour)) & (whats >= painter.FIRST_GLYPH)
        rows, cols = np.nonzero(own)
        for line in range(painter.SIDE, canvas.width, painter.SIDE):
            assert not cols.min() < (line - content.left) * unit - 1 < cols.max() - 1
        for line in range(painter.SIDE, canvas.height, painter.SIDE):
            assert not rows.min() < (line - content.top) * unit - 1 < rows.max() - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_are_cut_where_pixels_are_cut(seed: int) -> None:
    painted = scene(seed)
    pixels, labels = supervision.cut_pixels(painted.image), supervision.cut_labels(painted.labels)
    assert labels.shape == pixels.shape[:3]
    assert set(np.unique(labels)) <= set(np.unique(painted.labels)) | {0}
    whats, tints = np.divmod(labels, painter.NUM_TINTS)
    for shape in painted.of_kind("shape"):
        tint = 1 + list(COLOURS).index(shape.colour)
        own = (whats == painter.FIRST_SHAPE + SHAPES.index(shape.name)) & (tints == tint)
        off = np.abs(pixels[own].astype(int) - COLOURS[shape.colour]).max(-1)
        assert np.median(off) < 8


def test_targets_are_distributions_and_weigh_things_most() -> None:
    labels = np.stack([supervision.sheet(random.Random(seed))[1] for seed in range(4)])
    targets = supervision.targets(labels, np.array([True, False, False, False]))
    assert targets.what.sum(-1).allclose(targets.what.new_ones(()))
    ink = supervision.ink(labels)
    shown = (targets.what[..., painter.BACKGROUND] == 0).numpy()
    assert (targets.weight.numpy()[shown] >= 0.25).all()
    assert (targets.weight.numpy()[~shown] == np.float32(0.05)).all()
    assert (shown == ink).mean() > 0.9
    assert targets.presence.sum() > 4
