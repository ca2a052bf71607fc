"""Training sequences show the language model what generation will show it."""

from __future__ import annotations

import random

import pytest
import torch

from hired.embedded import painter, supervision
from hired.embedded.sequences import (
    IGNORED,
    TILING,
    Example,
    Picture,
    Pictures,
    compose,
    lay_out,
    with_newlines,
)
from hired.embedded.tokenisation import build_tokenizer
from hired.packing import pack, position_ids

PREFIX = [1, 4]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return next(iter(Pictures(5, build_tokenizer(), batch_size=6, drawn=False)))


def composed(pictures: list[Picture], *, full: bool, length: int) -> list[Example]:
    rng = random.Random(0)
    return [compose(picture, rng, length=length, num_texts=4, full=full) for picture in pictures]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_positions_are_those_of_generation(pictures: list[Picture], full: bool, compact: bool) -> None:
    length = 900 if full else 240
    examples = composed(pictures, full=full, length=length)
    sequences = lay_out(examples, PREFIX, length, compact=compact)
    for row, example in enumerate(examples):
        num_shared = len(PREFIX) + len(example.layout)
        answers = [answer for answer_row, answer, _ in sequences.answers if answer_row == row]
        for text, answer in zip(example.texts, answers, strict=True):
            whole = position_ids(
                len(PREFIX), example.layout, len(text.ids), "compact" if compact else "original"
            )
            question = slice(answer.start - text.num_question, answer.stop)
            assert sequences.positions[row, :num_shared].equal(whole[:num_shared])
            assert sequences.positions[row, question].equal(whole[num_shared:])


def test_a_question_sees_its_image_and_itself_alone(pictures: list[Picture]) -> None:
    examples = composed(pictures, full=False, length=240)
    sequences = lay_out(examples, PREFIX, 240, compact=False)
    for row, answer, _ in sequences.answers:
        seen = sequences.mask[row, answer.stop - 1].nonzero()[:, 0]
        num_shared = len(PREFIX) + len(examples[row].layout)
        assert seen[:num_shared].equal(torch.arange(num_shared))
        own = seen[num_shared:]
        assert own.equal(torch.arange(int(own[0]), answer.stop))
        others = [a for r, a, _ in sequences.answers if r == row and a != answer]
        assert not any(set(range(a.start, a.stop)) & set(seen.tolist()) for a in others)


def test_only_answers_are_learned(pictures: list[Picture]) -> None:
    examples = composed(pictures, full=False, length=240)
    sequences = lay_out(examples, PREFIX, 240, compact=False)
    learned = sum(len(text.ids) - text.num_question for example in examples for text in example.texts)
    assert int((sequences.targets != IGNORED).sum()) == learned > 0


def test_visual_embeddings_are_packed_as_generation_packs_them(pictures: list[Picture]) -> None:
    examples = composed(pictures, full=False, length=240)
    features = torch.randn(sum(len(example.patch) for example in examples), 7)
    newline = torch.randn(7)
    packed = with_newlines(examples, features, newline)
    own = features.split([len(example.patch) for example in examples])
    assert packed.equal(torch.cat([pack(e.layout, f, newline) for e, f in zip(examples, own, strict=True)]))


def test_dropping_keeps_real_patches_within_the_room(pictures: list[Picture]) -> None:
    for example in composed(pictures, full=False, length=240):
        assert 0 < len(example.patch) <= 120
        assert int(example.patch.max()) < TILING.patches_per_side**2


def test_dropping_never_takes_the_print_for_lack_of_room(pictures: list[Picture]) -> None:
    whole = partial = 0
    for picture in pictures:
        for seed in range(8):
            example = compose(picture, random.Random(seed), length=200, num_texts=4, full=False)
            shown = torch.from_numpy(picture.whats[1:, :, painter.FIRST_GLYPH :] >= supervision.VISIBLE).any(
                -1
            )
            kept = torch.zeros_like(shown)
            kept[example.partition[example.partition > 0] - 1, example.patch[example.partition > 0]] = True
            missing = int((shown & ~kept).sum())
            whole, partial = whole + (missing == 0), partial + (missing > 0)
            assert missing <= 0.35 * int(shown.sum()) + 2  # at most the few that are left out on purpose
    assert whole > partial
