"""Image bytes -> ``Partitions``: decode safely, stand upright, fit, pad, cut.

Pixels are uint8 from end to end; normalising is the device's work. The cut equals transformers' LLaVA-NeXT
image processor. Decoding differs from it on purpose: pictures are turned as their EXIF says, and 16-bit grey
keeps its upper eight bits where Pillow's own conversion turns all but the darkest to white.

Files are hostile: formats are an allow-list, sizes are read from the header and refused before any pixel is
decoded, and whatever a decoder raises comes out as one ``ImageError`` that never echoes the decoder's text.
Truncation is noticed in every format. Damage inside the data is noticed as far as the format has checksums:
PNG has, JPEG has none, and its decoder conceals what it can.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageFile

from hired.errors import ConfigurationError, ImageError, ImageTooLargeError, UnreadableImageError
from hired.geometry import Tiling, fit
from hired.types import Partitions, Size

# MPO is not listed: it opens as the JPEG that it begins with.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

# At most 1.2 GB while decoding: three copies at four bytes a pixel. WebP's own buffers make it 1.6 GB.
MAX_PIXELS = 100_000_000

# Resampling holds 32 bytes of weights for each pixel of a side, however thin the picture.
MAX_SIDE = 1_000_000

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_Opener: TypeAlias = Callable[[IO[bytes], str | bytes], ImageFile.ImageFile]


def partition(image: bytes | Image.Image, tiling: Tiling, *, max_pixels: int = MAX_PIXELS) -> Partitions:
    """The full-image and the sub-images of one picture, from a file's bytes or a Pillow image.

    Raises ``UnreadableImageError`` and ``ImageTooLargeError``.
    """
    picture = (
        _upright_rgb(image, max_pixels)
        if isinstance(image, Image.Image)
        else decode(image, max_pixels=max_pixels)
    )
    original, side = Size(picture.height, picture.width), tiling.side
    grid = tiling.grid(original)
    content = fit(original, Size(grid.rows * side, grid.cols * side))

    canvas = np.zeros((grid.rows * side, grid.cols * side, 3), np.uint8)
    canvas[content.top : content.bottom, content.left : content.right] = _resized(
        picture, Size(content.height, content.width)
    )
    sub_images = canvas.reshape(grid.rows, side, grid.cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    full_image = _resized(picture, Size(side, side))
    return Partitions(np.concatenate([full_image[None], sub_images]), grid, content, original)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file's bytes: RGB, upright, the first frame of several, transparency over white.

    Raises ``UnreadableImageError`` when the bytes are empty, of no supported format, truncated or corrupt,
    and ``ImageTooLargeError``, before decoding, when the header announces more than ``max_pixels``.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigurationError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so half pictures would pass for whole; unset it"
        )
    if not data:
        raise UnreadableImageError("the image is empty (0 bytes)")
    return _upright_rgb(_opened(data), max_pixels)


def _opened(data: bytes) -> Image.Image:
    """The picture behind its header, not decoded yet."""
    name, opener = _opener(data[:16])
    with _translated(name):
        return opener(io.BytesIO(data), "")


def _opener(head: bytes) -> tuple[str, _Opener]:
    """The format that the first bytes announce, and its reader.

    ``Image.open`` would do, but its limit on pixels is one for the whole process, set by whoever comes last.
    """
    Image.init()
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        if opener and accepts and accepts(head) is True:
            return name, opener
    raise UnreadableImageError(f"not an image in a supported format ({', '.join(FORMATS)})")


def _upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not width * height:
        raise UnreadableImageError(f"{width} x {height} pixels are no picture")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width} x {height} pixels exceed the limit of {max_pixels}; raise max_pixels to accept it"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(f"{width} x {height} pixels: no side may be longer than {MAX_SIDE}")
    with _translated(image.format or image.mode):
        image = image.copy()  # decodes; frees the decoder's buffers, and leaves the caller's image as it is
        orientation = _orientation(image)
        picture = _rgb(image)
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        picture.info = {}  # an orientation left here would have the next reader turn the picture again
        return picture


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises on a hostile file, struct.error or RecursionError, into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageTooLargeError(f"the {name} image asks for more memory than there is") from error
    except Exception as error:
        raise UnreadableImageError(f"the {name} image is truncated or corrupt") from error


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, None without one. Like every viewer, takes a broken EXIF block for none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return None
    return orientation if isinstance(orientation, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, transparency over white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _rgb_from_16_bit(image)
    if image.mode == "F":
        raise UnreadableImageError(
            "floating-point pixels have no defined white; convert the image to 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), _converted(image, "RGBA"))
    return _converted(image, "RGB")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image itself when it is in that mode, where Pillow would make a copy."""
    return image if image.mode == mode else image.convert(mode)


def _rgb_from_16_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 0xFFFF:
        raise UnreadableImageError("32-bit pixels have no defined white; convert the image to 8 or 16 bits")
    grey = (samples >> 8).astype(np.uint8)  # the upper byte, as Pillow reads 16-bit colour
    grey[samples == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def _resized(picture: Image.Image, size: Size) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(picture.resize((size.width, size.height), Image.Resampling.BICUBIC))
