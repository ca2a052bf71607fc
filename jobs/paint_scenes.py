"""Paints a sample corpus: scenes of mixed formats, sizes and aspects, three broken files, the true captions.

python jobs/paint_scenes.py --output examples/scenes --count 64
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from hired.embedded import painter
from hired.embedded.lexicon import held_out_text
from hired.embedded.questions import describe
from hired.types import Size

# suffix: how Pillow is to write it, and how often
FORMATS: dict[str, tuple[dict[str, Any], int]] = {
    ".jpg": ({"quality": 90, "subsampling": 0}, 8),
    ".webp": ({"quality": 90}, 4),
    ".png": ({"optimize": True}, 2),
    ".gif": ({}, 1),
    ".bmp": ({}, 1),
    ".tif": ({"compression": "tiff_lzw"}, 1),
}


def main() -> int:
    options = _parser().parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    with (options.output / "captions.jsonl").open("w") as captions:
        for number in range(options.count):
            scene, name = _scene(rng, number)
            settings, _ = FORMATS[Path(name).suffix]
            scene.image.save(options.output / name, **settings)
            captions.write(json.dumps({"file_name": name, "caption": describe(scene)}) + "\n")
    _broken_files(options.output)
    print(f"{options.count} scenes, 3 broken files and their captions.jsonl are in {options.output}")
    return 0


def _scene(rng: random.Random, number: int) -> tuple[painter.Scene, str]:
    """A scene from half to twice its canvas's size, and its file's name."""
    suffix = rng.choices(list(FORMATS), [weight for _, weight in FORMATS.values()])[0]
    size = painter.random_size(rng)
    zoom = 1.0 if suffix in (".bmp", ".tif", ".png", ".gif") else rng.choice((0.8, 1.0, 1.5, 2.0))
    size = Size(round(size.height * zoom), round(size.width * zoom))
    return painter.paint(rng, size, text=held_out_text), f"scene-{number:03d}{suffix}"


def _broken_files(folder: Path) -> None:
    """A file cut off in the middle, an empty one, and one that is no picture: every corpus has them."""
    whole = io.BytesIO()
    Image.effect_noise((240, 180), 40).convert("RGB").save(whole, "JPEG")
    (folder / "broken-cut-off.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "broken-empty.png").write_bytes(b"")
    (folder / "broken-no-picture.jpg").write_bytes(b"<html><body>404: no such picture</body></html>\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
