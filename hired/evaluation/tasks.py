"""The tasks that this project draws: questions about painted scenes that no training step has seen.

Every sign says a word that training never shows, and seeds are the evaluation's own. Half of the scenes have
all they show in one part of the picture, so that sub-images differ in what they hold; pages hold signs alone,
six to eight of them, two to three times as many as any scene of the training. Scenes and pages alternate, so
that the first pictures of a set are a small set of the same kind.

The questions are of the forms that the embedded model was taught; it knows no others. What it answers badly
with every token (what lies at a place) stays in: a task with much to lose and little to show tells methods
apart less, and says so by its interval.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from hired.embedded import painter, questions
from hired.embedded.lexicon import held_out_text
from hired.embedded.painter import Recipe, Scene
from hired.embedded.questions import Question
from hired.evaluation.items import Item, Picture

# Of an answer of one word or two; the longest word on a sign is six tokens.
SHORT = 12
CAPTION = 96
# Ten annotators who agree, as VQAv2's and TextVQA's metrics expect.
NUM_ANNOTATORS = 10
# One picture in seven is a page.
PAGE_EVERY = 7
# More scenes have a chart than in training, so that there are as many questions about them as about others.
CHARTS = 0.5
QUALITY = 92


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: the forms of question that belong to it, as ``hired.embedded.questions`` names them.

    ``like`` says which benchmarks of photographs it stands in for. A ``rare`` one is not asked about every
    picture of its kind, and where it is, in full.
    """

    name: str
    title: str
    like: str
    forms: tuple[str, ...]
    metric: str
    on_pages: bool = False
    rare: bool = False
    max_new_tokens: int = SHORT
    num_answers: int = 1


TASKS = (
    Task("objects", "Colours and shapes", "VQAv2", ("colour", "shape"), "vqa", num_answers=NUM_ANNOTATORS),
    Task("presence", "Is it there?", "POPE, MME", ("yes-no",), "pope"),
    Task("counting", "How many?", "VQAv2", ("count",), "exact"),
    Task("places", "What is at a place?", "VQAv2, localisation", ("place",), "exact"),
    Task("signs", "Signs, by colour", "TextVQA", ("read",), "textvqa", num_answers=NUM_ANNOTATORS),
    Task("signs-at", "Signs, by place", "OCRBench", ("read-place",), "ocrbench"),
    Task("pages", "Pages of signs", "DocVQA", ("read",), "anls", on_pages=True),
    Task("charts", "Values in charts", "ChartQA", ("chart",), "relaxed", rare=True),
    Task("captions", "Captions", "captions", ("describe",), "contents", max_new_tokens=CAPTION),
)

# Where everything lies in a skewed scene.
_CORNERS = tuple(
    tuple((row, col) for row in (top, top + 1) for col in (left, left + 1))
    for top in (0, 1)
    for left in (0, 1)
)
_SIDES = (
    *(tuple((row, col) for row in range(3)) for col in (0, 2)),
    *(tuple((row, col) for col in range(3)) for row in (0, 2)),
)
_MIXED = Recipe(chart=CHARTS)
_PAGE = Recipe(chart=0.0, signs=(6, 8), shapes=(0, 0))


def draw(num_pictures: int, seed: int, *, most: int = 2) -> Iterator[Picture]:
    """The first pictures of the set that ``seed`` decides, each with at most so many questions of a task.

    Every scene asks every task of scenes but the rare ones. A picture does not depend on how many are drawn.
    """
    for number in range(num_pictures):
        rng = random.Random(f"evaluation {seed} {number}")
        on_page = number % PAGE_EVERY == PAGE_EVERY - 1
        yield _picture(f"{seed}-{number:05d}", rng, on_page, most)


def _picture(key: str, rng: random.Random, on_page: bool, most: int) -> Picture:
    while True:
        scene = _page(rng) if on_page else _scene(rng)
        items = tuple(_items(key, scene, rng, on_page, most))
        always = {task.name for task in TASKS if task.on_pages == on_page and not task.rare}
        if always <= {item.task for item in items}:
            return Picture(key, _encoded(scene), items)


def _scene(rng: random.Random) -> Scene:
    recipe = _MIXED
    kind = rng.random()
    if kind < 0.25:
        recipe = Recipe(CHARTS, signs=(1, 2), shapes=(1, 3), places=rng.choice(_CORNERS))
    elif kind < 0.5:
        recipe = Recipe(signs=(1, 1), shapes=(1, 2), places=rng.choice(_SIDES))
    return painter.paint(rng, painter.random_size(rng), text=held_out_text, recipe=recipe)


def _page(rng: random.Random) -> Scene:
    # Canvases of three sub-images in a row are too low for so many signs.
    sizes = [size for size in painter.PINPOINTS if min(size.height, size.width) > painter.SIDE]
    return painter.paint(rng, rng.choice(sizes), text=held_out_text, recipe=_PAGE)


def _items(key: str, scene: Scene, rng: random.Random, on_page: bool, most: int) -> Iterator[Item]:
    asked = questions.ask(scene, rng)
    for task in TASKS:
        if task.on_pages == on_page:
            suiting = [question for question in asked if question.task in task.forms]
            limit = len(suiting) if on_page or task.rare else most
            for number, question in enumerate(suiting[:limit]):
                yield _item(f"{key}-{task.name}-{number}", key, task, question)


def _item(key: str, picture: str, task: Task, question: Question) -> Item:
    return Item(
        key=key,
        task=task.name,
        picture=picture,
        question=question.text,
        answers=(question.answer,) * task.num_answers,
        metric=task.metric,
        max_new_tokens=task.max_new_tokens,
    )


def _encoded(scene: Scene) -> bytes:
    """A JPEG with colours at full resolution, as small print needs them."""
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
