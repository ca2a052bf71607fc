"""Picture files made on the spot: every kind that a corpus may hold, the hostile ones included."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112

# How a viewer must turn the stored pixels, so how a camera stored them: the inverse of each turn.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(width: int = 90, height: int = 60, *, noise: int = 0) -> Image.Image:
    """A smooth picture without any symmetry: red grows to the right, green downwards, blue on one side."""
    rows, cols = np.mgrid[0:height, 0:width]
    channels = [
        255 * cols / max(1, width - 1),
        255 * rows / max(1, height - 1),
        255.0 * (cols + 2 * rows < width / 2),
    ]
    pixels = np.stack(channels, axis=-1)
    pixels += np.random.default_rng(0).uniform(-noise, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int, file_format: str = "JPEG", **options: Any) -> bytes:
    """The picture as a camera held in that EXIF orientation would have stored it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = image.transpose(STORED_AS[orientation]) if orientation in STORED_AS else image
    return saved(stored, file_format, exif=exif, **options)


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG file written by hand, for what Pillow does not write; ``rows`` begin with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = [("IHDR", header), *chunks.items(), ("IDAT", zlib.compress(rows)), ("IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name.encode(), content) for name, content in body)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_bomb(width: int, height: int) -> bytes:
    """A header that announces far more pixels than the few that follow."""
    return png(width, height, 8, 2, bytes(1000))


def gif_bomb(width: int, height: int) -> bytes:
    """A small frame on a huge screen."""
    frame = saved(Image.new("P", (2, 2)), "GIF")
    return frame[:6] + struct.pack("<HH", width, height) + frame[10:]


def write_corpus(folder: Path) -> None:
    """A small stand-in for the corpus of real files: the same folders, and the names that tests expect."""
    photo, page = picture(768, 512, noise=20), Image.new("L", (465, 1013), 240)
    files = {
        "photos/kodak-01.png": saved(photo, "PNG"),
        "photos/kodak-02.png": saved(photo.rotate(90, expand=True), "PNG"),
        "photos/clic-00.jpg": saved(picture(1400, 1000, noise=20), "JPEG", quality=90),
        "documents/receipt-019.jpg": saved(page, "JPEG"),
        "hostile/Channel_digital_image_CMYK_color_no_profile.jpg": saved(photo.convert("CMYK"), "JPEG"),
        "hostile/Flag_of_the_Netherlands-16bit.png": png(
            2, 1, 16, 2, b"\0" + struct.pack(">6H", *[40_000] * 6)
        ),
        "hostile/animated-loop-3.gif": saved(photo, "GIF", save_all=True, append_images=[page]),
        "hostile/animated-loop-3.webp": saved(
            photo, "WEBP", save_all=True, append_images=[page.resize(photo.size)]
        ),
        "hostile/corrupt-header.jpg": saved(photo, "JPEG")[:4] + bytes(60),
        "hostile/empty.jpg": b"",
        "hostile/giant-image.jpg": _giant_jpeg(),
        "hostile/65536-uint32-limit.png": png_bomb(65536, 65536),
        "hostile/not-an-image.png": b"<html><body>404 Not Found</body></html>",
        "hostile/truncated.jpg": saved(photo, "JPEG")[:5000],
        "hostile/truncated.png": saved(photo, "PNG")[:5000],
        "hostile/pngsuite-basn0g16.png": png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0, 0xFFFF)),
        "hostile/pngsuite-xd9n2c08.png": png(8, 8, 99, 2, bytes(1000)),
        "hostile/pngsuite-xs1n0g01.png": b"\x09" + png_bomb(8, 8)[1:],
    }
    for orientation in range(9):
        for name, upright in (("Landscape", photo), ("Portrait", photo.rotate(90, expand=True))):
            files[f"hostile/exif-{name}_{orientation}.jpg"] = turned(upright, orientation)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _giant_jpeg() -> bytes:
    """A small JPEG whose frame header says 20000 x 14000."""
    data = bytearray(saved(picture(), "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 14_000, 20_000)
    return bytes(data)
