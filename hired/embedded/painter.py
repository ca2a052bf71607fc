"""Scenes with known contents: backgrounds, coloured shapes, signs in small print, bar charts.

A scene is drawn for the canvas that LLaVA-NeXT's partitioning will fit it to: print is 15 to 24 canvas
pixels high, so the sub-images resolve it and the squashed full-image does not. Beside the picture the
painter keeps a label for every pixel, which costs nothing here and which photographs never have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from hired.embedded.lexicon import COLOURS, COLS, GLYPHS, MAX_GLYPHS, ROWS, SHAPES, training_text
from hired.geometry import best_canvas, fit
from hired.types import Size

SIDE = 192
PINPOINTS = (Size(384, 384), Size(192, 384), Size(384, 192), Size(192, 576), Size(576, 192))

# A pixel's label is what * NUM_TINTS + tint: what lies there, and whose colour it bears.
BACKGROUND, PLATE, BAR = 0, 1, 2
FIRST_SHAPE = 3
FIRST_GLYPH = FIRST_SHAPE + len(SHAPES)
NUM_WHATS = FIRST_GLYPH + MAX_GLYPHS * len(GLYPHS)
NUM_TINTS = len(COLOURS) + 1

Rectangle = tuple[float, float, float, float]
Colour = tuple[int, int, int]
CAP_HEIGHT = 0.74  # of DejaVu's capitals, as a share of the font size

_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_TINT = {name: i + 1 for i, name in enumerate(COLOURS)}
_DARK = {"red", "green", "blue", "purple", "black"}


@dataclass(frozen=True, slots=True)
class Thing:
    """Something in a scene. ``text`` is what a sign says or the value a bar stands for."""

    kind: Literal["shape", "sign", "bar", "chart"]
    colour: str
    name: str
    text: str
    place: tuple[int, int]

    @property
    def place_name(self) -> str:
        return f"{ROWS[self.place[0]]} {COLS[self.place[1]]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, its pixel labels (int32, the picture's shape) and its things in reading order.

    ``picture`` is None where only labels were asked for.
    """

    picture: Image.Image | None
    labels: NDArray[np.int32]
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        if self.picture is None:
            raise ValueError("this scene was made of labels alone; paint it with Brush to have a picture")
        return self.picture

    def of_kind(self, kind: str) -> list[Thing]:
        return [thing for thing in self.things if thing.kind == kind]


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def glyph_label(index: int, glyph: str) -> int:
    """The label of ``glyph`` as the text's character number ``index``."""
    return FIRST_GLYPH + index * len(GLYPHS) + GLYPHS.index(glyph)


class LabelBrush:
    """Marks what is drawn where, and draws nothing: enough to train the language model's part alone."""

    def __init__(self, size: Size, background_seed: int) -> None:
        del background_seed
        self._labels = Image.new("I", (size.width, size.height), 0)
        self._mark = ImageDraw.Draw(self._labels)

    @property
    def image(self) -> Image.Image | None:
        return None

    @property
    def labels(self) -> NDArray[np.int32]:
        return np.asarray(self._labels, dtype=np.int32)

    def rectangle(self, box: Rectangle, rgb: Colour, label: int) -> None:
        del rgb
        self._mark.rectangle(box, fill=label)

    def shape(self, name: str, colour: str, box: Rectangle) -> None:
        _draw_shape(self._mark, name, box, (FIRST_SHAPE + SHAPES.index(name)) * NUM_TINTS + _TINT[colour])

    def text(self, start: tuple[float, float], text: str, font: FreeTypeFont, rgb: Colour, tint: str) -> None:
        """Marks each glyph's advance box, from the capitals' height down to the baseline at ``start``."""
        del rgb
        x, y = start
        for index, glyph in enumerate(text):
            advance = font.getlength(glyph)
            label = glyph_label(index, glyph) * NUM_TINTS + _TINT[tint]
            self._mark.rectangle((x, y - CAP_HEIGHT * font.size, x + advance - 1, y), fill=label)
            x += advance


class Brush(LabelBrush):
    """Draws the same things on a picture and on its label map."""

    def __init__(self, size: Size, background_seed: int) -> None:
        super().__init__(size, background_seed)
        self._image = background(size, np.random.default_rng(background_seed))
        self._draw = ImageDraw.Draw(self._image)

    @property
    def image(self) -> Image.Image:
        return self._image

    def rectangle(self, box: Rectangle, rgb: Colour, label: int) -> None:
        super().rectangle(box, rgb, label)
        self._draw.rectangle(box, fill=rgb)

    def shape(self, name: str, colour: str, box: Rectangle) -> None:
        super().shape(name, colour, box)
        _draw_shape(self._draw, name, box, COLOURS[colour])

    def text(self, start: tuple[float, float], text: str, font: FreeTypeFont, rgb: Colour, tint: str) -> None:
        super().text(start, text, font, rgb, tint)
        self._draw.text(start, text, font=font, fill=rgb, anchor="ls")


def _draw_shape(draw: ImageDraw.ImageDraw, name: str, box: Rectangle, ink: object) -> None:
    left, top, right, bottom = box
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    arm = radius * 0.34
    if name == "circle":
        draw.ellipse(box, fill=ink)  # type: ignore[arg-type]
    elif name == "square":
        draw.rectangle(box, fill=ink)  # type: ignore[arg-type]
    elif name == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=ink)  # type: ignore[arg-type]
    elif name == "cross":
        draw.rectangle((x - arm, top, x + arm, bottom), fill=ink)  # type: ignore[arg-type]
        draw.rectangle((left, y - arm, right, y + arm), fill=ink)  # type: ignore[arg-type]
    elif name == "ring":
        draw.ellipse(box, outline=ink, width=max(3, round(radius * 0.38)))  # type: ignore[arg-type]
    else:
        spikes = [
            (x + r * math.sin(i * math.pi / 5), y - r * math.cos(i * math.pi / 5))
            for i in range(10)
            for r in (radius if i % 2 == 0 else radius * 0.45,)
        ]
        draw.polygon(spikes, fill=ink)  # type: ignore[arg-type]


def background(size: Size, noise: np.random.Generator) -> Image.Image:
    """Muted light and shade like a photograph's out-of-focus parts: a tint, a slope, clouds and grain."""
    h, w = size.height, size.width
    tone = noise.uniform(95, 190, 3).astype(np.float32)
    tone += (tone.mean() - tone) * 0.45
    slope = np.linspace(-1, 1, w, dtype=np.float32)[None] * noise.uniform(-25, 25)
    slope = slope + np.linspace(-1, 1, h, dtype=np.float32)[:, None] * noise.uniform(-25, 25)
    clouds = Image.fromarray(noise.integers(0, 256, (h // 48 + 2, w // 48 + 2), dtype=np.uint8))
    slope += np.asarray(clouds.resize((w, h), Image.Resampling.BICUBIC), np.float32) * noise.uniform(
        0.03, 0.16
    )
    grain = noise.integers(-9, 10, (h // 2 + 1, w // 2 + 1), dtype=np.int8).repeat(2, 0).repeat(2, 1)[:h, :w]
    slope += grain * noise.uniform(0.2, 1.0)
    return Image.fromarray((tone + slope[..., None]).clip(0, 255).astype(np.uint8))


PLACES = tuple((row, col) for row in range(3) for col in range(3))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a scene is made of: how likely a chart is, how many signs and shapes, and where they may lie.

    Numbers are a least and a most; what finds no room is left out.
    """

    chart: float = 0.3
    signs: tuple[int, int] = (1, 3)
    shapes: tuple[int, int] = (1, 4)
    places: tuple[tuple[int, int], ...] = PLACES


MIXED = Recipe()


def paint(
    rng: random.Random,
    size: Size,
    *,
    text: Callable[[random.Random], str] = training_text,
    brush_type: type[LabelBrush] = Brush,
    recipe: Recipe = MIXED,
) -> Scene:
    """A scene of the given size in pixels, of which ``rng`` decides everything.

    Things keep clear of each other, and signs and charts of the lines at which the canvas is cut into
    sub-images: the model reads what one partition shows whole.
    """
    canvas = best_canvas(size, PINPOINTS)
    unit = size.width / fit(size, canvas).width
    brush = brush_type(size, rng.getrandbits(48))
    layout = _Layout(rng, size, unit, canvas, recipe.places)
    things: list[Thing] = []
    tints = rng.sample(sorted(COLOURS), len(COLOURS))
    if rng.random() < recipe.chart:
        things += _paint_chart(brush, layout, rng, tints)
    for _ in range(rng.randint(*recipe.signs)):
        things += _paint_sign(brush, layout, rng, tints.pop(), text(rng))
    for _ in range(rng.randint(*recipe.shapes)):
        things += _paint_shape(brush, layout, rng)
    return Scene(brush.image, brush.labels, tuple(sorted(things, key=lambda thing: thing.place)))


def random_size(rng: random.Random) -> Size:
    """A picture size near a canvas's: some the same, some that need padding, some that need resizing."""
    canvas = rng.choices(PINPOINTS, (5, 2, 2, 1, 1))[0]
    if rng.random() < 0.4:
        return canvas
    zoom = rng.uniform(0.8, 1.3) if rng.random() < 0.5 else 1.0
    squeeze = (rng.uniform(0.78, 1.0), 1.0)
    by_height, by_width = squeeze if rng.random() < 0.5 else squeeze[::-1]
    return Size(round(canvas.height * zoom * by_height), round(canvas.width * zoom * by_width))


class _Layout:
    """Hands out free rectangles, one to each of the places."""

    def __init__(
        self,
        rng: random.Random,
        size: Size,
        unit: float,
        canvas: Size,
        places: tuple[tuple[int, int], ...] = PLACES,
    ) -> None:
        self.rng, self.size, self.unit = rng, size, unit
        self.free = list(places)
        rng.shuffle(self.free)
        self.taken: list[Rectangle] = []
        content = fit(size, canvas)
        self.seams_x = [(x - content.left) * unit for x in range(SIDE, canvas.width, SIDE)]
        self.seams_y = [(y - content.top) * unit for y in range(SIDE, canvas.height, SIDE)]

    def take(
        self, width: float, height: float, *, whole: bool
    ) -> tuple[tuple[int, int], float, float] | None:
        """A place and the top left corner for a box of this size, or None where nothing fits."""
        for place in self.free:
            for _ in range(12):
                x = (place[1] + self.rng.random()) * self.size.width / 3 - width / 2
                y = (place[0] + self.rng.random()) * self.size.height / 3 - height / 2
                box = (x, y, x + width, y + height)
                if self._fits(box, whole):
                    self.free.remove(place)
                    self.taken.append(box)
                    return place, x, y
        return None

    def _fits(self, box: Rectangle, whole: bool) -> bool:
        left, top, right, bottom = box
        gap = 3 * self.unit
        if left < gap or top < gap or right > self.size.width - gap or bottom > self.size.height - gap:
            return False
        if any(
            box[0] < right + gap and left < box[2] + gap and box[1] < bottom + gap and top < box[3] + gap
            for box in self.taken
        ):
            return False
        cut = any(left < x < right for x in self.seams_x) or any(top < y < bottom for y in self.seams_y)
        return not (whole and cut)


def _paint_shape(brush: LabelBrush, layout: _Layout, rng: random.Random) -> list[Thing]:
    name, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
    extent = rng.uniform(30, min(90, 0.3 * layout.size.height / layout.unit + 10)) * layout.unit
    spot = layout.take(extent, extent, whole=False)
    if spot is None:
        return []
    place, x, y = spot
    brush.shape(name, colour, (x, y, x + extent, y + extent))
    return [Thing("shape", colour, name, "", place)]


def _paint_sign(
    brush: LabelBrush, layout: _Layout, rng: random.Random, colour: str, text: str
) -> list[Thing]:
    font = _font(rng.choice(_FONTS), max(6, round(rng.uniform(17, 24) * layout.unit)))
    pad = rng.uniform(4, 8) * layout.unit
    width, cap = font.getlength(text), CAP_HEIGHT * font.size
    spot = layout.take(width + 2 * pad, cap + 2 * pad, whole=True)
    if spot is None:
        return []
    place, x, y = spot
    draw_sign(brush, (x, y), text, colour, font, pad)
    return [Thing("sign", colour, "sign", text, place)]


def draw_sign(
    brush: LabelBrush, corner: tuple[float, float], text: str, colour: str, font: FreeTypeFont, pad: float
) -> None:
    """A coloured plate with ``text`` on it, its top left corner at ``corner``."""
    x, y = corner
    width, cap = font.getlength(text), CAP_HEIGHT * font.size
    brush.rectangle(
        (x, y, x + width + 2 * pad, y + cap + 2 * pad), COLOURS[colour], PLATE * NUM_TINTS + _TINT[colour]
    )
    ink = (250, 250, 250) if colour in _DARK else (12, 12, 12)
    brush.text((x + pad, y + pad + cap), text, font, ink, colour)


def _paint_chart(brush: LabelBrush, layout: _Layout, rng: random.Random, tints: list[str]) -> list[Thing]:
    """A chart of two to four bars, in colours that no sign of the scene will have."""
    chart = random_chart(rng, layout.unit)
    spot = layout.take(chart.width, chart.height, whole=True)
    if spot is None:
        return []
    place, x, y = spot
    for colour in chart.values:
        tints.remove(colour)
    draw_chart(brush, (x, y), chart)
    bars = [Thing("bar", colour, "bar", str(value), place) for colour, value in chart.values.items()]
    return [Thing("chart", "white", "chart", str(len(bars)), place), *bars]


@dataclass(frozen=True, slots=True)
class Chart:
    """The values by bar colour, and the chart's measures in pixels."""

    values: dict[str, int]
    font: FreeTypeFont
    unit: float
    tallest: float

    @property
    def pitch(self) -> float:
        return 30 * self.unit

    @property
    def gap(self) -> float:
        return 4 * self.unit

    @property
    def cap(self) -> float:
        return CAP_HEIGHT * self.font.size

    @property
    def width(self) -> float:
        return self.pitch * len(self.values) + 2 * self.gap

    @property
    def height(self) -> float:
        return self.tallest + self.cap + 4 * self.gap


def random_chart(rng: random.Random, unit: float) -> Chart:
    colours = rng.sample([colour for colour in sorted(COLOURS) if colour != "white"], rng.randint(2, 4))
    font = _font(_FONTS[rng.randrange(2)], max(6, round(rng.uniform(15, 18) * unit)))
    return Chart({colour: rng.randint(5, 99) for colour in colours}, font, unit, rng.uniform(34, 60) * unit)


def draw_chart(brush: LabelBrush, corner: tuple[float, float], chart: Chart) -> None:
    """A white panel of bars, each bar's value in small print above it."""
    left, top = corner
    panel = (left, top, left + chart.width, top + chart.height)
    brush.rectangle(panel, (250, 250, 250), PLATE * NUM_TINTS + _TINT["white"])
    base = panel[3] - chart.gap
    for i, (colour, value) in enumerate(chart.values.items()):
        x = left + chart.gap + i * chart.pitch
        y = base - chart.tallest * value / 99
        bar = (x + 0.15 * chart.pitch, y, x + 0.85 * chart.pitch, base)
        brush.rectangle(bar, COLOURS[colour], BAR * NUM_TINTS + _TINT[colour])
        text = str(value)
        middle = x + (chart.pitch - chart.font.getlength(text)) / 2
        brush.text((middle, y - chart.gap), text, chart.font, (12, 12, 12), colour)
