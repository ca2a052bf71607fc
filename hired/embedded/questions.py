"""What is asked about a scene, with the exact answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hired.embedded.lexicon import COLOURS, SHAPES
from hired.embedded.painter import Scene, Thing

Task = Literal[
    "describe", "read", "read-place", "place", "colour", "shape", "yes-no", "count", "chart", "echo"
]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its one right answer."""

    task: Task
    text: str
    answer: str


def describe(scene: Scene) -> str:
    """The true caption: every thing in reading order."""
    return ", ".join(_phrase(thing) for thing in scene.things if thing.kind != "bar") + "."


def _phrase(thing: Thing) -> str:
    if thing.kind == "chart":
        return f"a chart of {thing.text} bars at {thing.place_name}"
    saying = f" saying {thing.text}" if thing.kind == "sign" else ""
    return f"a {thing.colour} {thing.name}{saying} at {thing.place_name}"


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question that the scene answers without doubt, and yes/no and count questions of both kinds."""
    questions = [
        Question("describe", "Describe the image.", describe(scene)),
        *_reading(scene),
        *_looking(scene),
        *_existence(scene, rng),
        *_counting(scene, rng),
    ]
    rng.shuffle(questions)
    return questions


def _reading(scene: Scene) -> Iterator[Question]:
    for sign in scene.of_kind("sign"):
        yield Question("read", f"What does the {sign.colour} sign say?", sign.text)
        yield Question("read-place", f"What does the sign at {sign.place_name} say?", sign.text)
    for bar in scene.of_kind("bar"):
        yield Question("chart", f"What is the value of the {bar.colour} bar?", bar.text)


def _looking(scene: Scene) -> Iterator[Question]:
    shapes = scene.of_kind("shape")
    names, colours = Counter(s.name for s in shapes), Counter(s.colour for s in shapes)
    for shape in shapes:
        if names[shape.name] == 1:
            yield Question("colour", f"What color is the {shape.name}?", shape.colour)
        if colours[shape.colour] == 1:
            yield Question("shape", f"Which shape is {shape.colour}?", shape.name)
    for thing in (*shapes, *scene.of_kind("sign")):
        yield Question("place", f"What is at {thing.place_name}?", f"a {thing.colour} {thing.name}")


def _existence(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """As many yes as no; half of the no's name a shape and a colour that are there, apart."""
    shapes = scene.of_kind("shape")
    there = {(s.colour, s.name) for s in shapes}
    if there:
        colour, name = rng.choice(sorted(there))
        yield Question("yes-no", f"Is there a {colour} {name}?", "yes")
    colours = sorted({c for c, _ in there} if there and rng.random() < 0.5 else COLOURS)
    names = sorted({n for _, n in there} if there and rng.random() < 0.5 else SHAPES)
    absent = [(c, n) for c in colours for n in names if (c, n) not in there]
    colour, name = rng.choice(absent or [(c, n) for c in COLOURS for n in SHAPES if (c, n) not in there])
    yield Question("yes-no", f"Is there a {colour} {name}?", "no")


def _counting(scene: Scene, rng: random.Random) -> Iterator[Question]:
    names = Counter(s.name for s in scene.of_kind("shape"))
    if names:
        name = rng.choice(sorted(names))
        yield Question("count", f"How many {_plural(name)} are there?", str(names[name]))
    yield Question("count", "How many signs are there?", str(len(scene.of_kind("sign"))))


def _plural(name: str) -> str:
    return f"{name}es" if name == "cross" else f"{name}s"
