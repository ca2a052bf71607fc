"""The images of a run, as files' bytes: drawn on the spot, or the first of a folder, over and over
if there are fewer than asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from hired.errors import ConfigurationError, ImageError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Size

# Width to height. The mix has every grid of LLaVA-NeXT and pictures that pad.
ASPECTS = {"square": (1.0,), "mix": (1.0, 1.5, 0.67, 2.0, 0.5, 3.0, 0.33, 1.2)}
LONG_SIDE = 1024


def drawn(count: int, aspect: str) -> list[bytes]:
    """JPEG files of blotches of colour, one megapixel at most, the same on every call."""
    if aspect not in ASPECTS:
        raise ConfigurationError(f"--aspect {aspect}: use one of {', '.join(ASPECTS)}")
    ratios = ASPECTS[aspect]
    return [_jpeg(number, ratios[number % len(ratios)]) for number in range(count)]


def _jpeg(number: int, ratio: float) -> bytes:
    size = Size(int(LONG_SIDE / max(1.0, ratio)), int(LONG_SIDE * min(1.0, ratio)))
    noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((size.width, size.height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def found(folder: Path, count: int, tiling: Tiling) -> list[bytes]:
    """The first files of a folder that can be partitioned, over and over until there are ``count``."""
    files = list(islice(_readable(folder, tiling), count))
    if not files:
        raise ConfigurationError(f"--input {folder}: no readable images there")
    return list(islice(cycle(files), count))


def _readable(folder: Path, tiling: Tiling) -> Iterator[bytes]:
    if not folder.is_dir():
        raise ConfigurationError(f"--input {folder}: no such folder")
    for file in sorted(folder.iterdir()):
        if file.is_file():
            data = file.read_bytes()
            try:
                partition(data, tiling)
            except ImageError:
                continue
            yield data
