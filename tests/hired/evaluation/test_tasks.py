"""The drawn tasks: what they ask, and that training never showed it."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from PIL import Image

from hired.embedded import painter
from hired.embedded.lexicon import SEEN_WORDS, UNSEEN_WORDS
from hired.evaluation.items import Item, Picture
from hired.evaluation.scoring import score
from hired.evaluation.tasks import PAGE_EVERY, TASKS, draw
from hired.geometry import best_canvas, fit
from hired.types import Size

SEED = 3
NUM_PICTURES = 42


@pytest.fixture(scope="module")
def pictures() -> Sequence[Picture]:
    return list(draw(NUM_PICTURES, SEED))


@pytest.fixture(scope="module")
def items(pictures: Sequence[Picture]) -> Sequence[Item]:
    return [item for picture in pictures for item in picture.items]


def size(picture: Picture) -> Size:
    image = Image.open(io.BytesIO(picture.data))
    return Size(image.height, image.width)


def test_a_picture_does_not_depend_on_how_many_are_drawn(pictures: Sequence[Picture]) -> None:
    assert list(draw(5, SEED)) == list(pictures[:5])


def test_other_seeds_draw_other_pictures(pictures: Sequence[Picture]) -> None:
    others = list(draw(5, SEED + 1))
    assert not {picture.key for picture in others} & {picture.key for picture in pictures}
    assert not {picture.data for picture in others} & {picture.data for picture in pictures}


def test_every_task_is_asked_and_the_truth_gets_full_marks(items: Sequence[Item]) -> None:
    assert {item.task for item in items} == {task.name for task in TASKS}
    assert all(score(item.metric, item.answers[0], item.answers) == 1.0 for item in items)
    assert len({item.key for item in items}) == len(items)


def test_every_scene_asks_every_task_but_charts_and_at_most_so_many_questions() -> None:
    for picture in draw(PAGE_EVERY, SEED, most=1):
        counts = Counter(item.task for item in picture.items)
        if "pages" in counts:
            assert set(counts) == {"pages"}
            assert counts["pages"] >= 3
        else:
            charts = counts.pop("charts", 0)
            assert charts in (0, 2, 3, 4)
            assert counts == {task.name: 1 for task in TASKS if not task.on_pages and not task.rare}


def test_signs_say_words_that_training_never_shows(items: Sequence[Item]) -> None:
    read = {item.answers[0] for item in items if item.task in ("signs", "signs-at", "pages")}
    assert read <= set(UNSEEN_WORDS)
    assert not read & set(SEEN_WORDS)


def test_yes_and_no_are_both_asked_for(items: Sequence[Item]) -> None:
    answers = Counter(item.answers[0] for item in items if item.task == "presence")
    assert min(answers["yes"], answers["no"]) > 0.3 * answers.total()


def test_pictures_are_wide_tall_square_and_padded(pictures: Sequence[Picture]) -> None:
    canvases, padded = Counter(), 0
    for picture in pictures:
        canvas = best_canvas(size(picture), painter.PINPOINTS)
        content = fit(size(picture), canvas)
        canvases[canvas.width > canvas.height, canvas.width == canvas.height] += 1
        padded += (content.height, content.width) != (canvas.height, canvas.width)
    assert len(canvases) == 3
    assert padded > len(pictures) / 5


def test_many_scenes_have_everything_in_one_part(pictures: Sequence[Picture]) -> None:
    """Captions name the places: a scene on one side names no more than three."""
    rows: dict[str, set[str]] = defaultdict(set)
    columns: dict[str, set[str]] = defaultdict(set)
    captions = [item for picture in pictures for item in picture.items if item.task == "captions"]
    for item in captions:
        for phrase in item.answers[0].removesuffix(".").split(", "):
            row, column = phrase.split(" at ")[-1].split()
            rows[item.key].add(row)
            columns[item.key].add(column)
    skewed = sum(min(len(rows[item.key]), len(columns[item.key])) < 3 for item in captions)
    assert 0.4 * len(captions) < skewed


def test_an_item_needs_an_answer_and_room_for_one() -> None:
    with pytest.raises(ValueError, match="no right answer"):
        Item("k", "t", "p", "Is it?", (), "pope", 4)
    with pytest.raises(ValueError, match="lets no answer be given"):
        Item("k", "t", "p", "Is it?", ("yes",), "pope", 0)
