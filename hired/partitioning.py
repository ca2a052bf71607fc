"""Image bytes -> ``Partitions``: decode safely, stand upright, fit, pad, cut.

Pixels are uint8 from end to end; normalising is the device's work. The cut equals transformers' LLaVA-NeXT
image processor. Decoding differs from it on purpose: pictures are turned as their EXIF says, and 16-bit grey
keeps its upper eight bits where Pillow's own conversion turns all but the darkest to white.

Equality has its price: weighing all pixels twice, for the full-image and for the sub-images, takes Pillow far
longer than decoding. ``reduced=True`` gives equality up for a few levels of difference: big pictures are
averaged down first, JPEGs while they are decoded, to no less than twice what is needed; torch resamples the
rest.

Files are hostile: formats are an allow-list, sizes are read from the header and refused before any pixel is
decoded, and whatever a decoder raises comes out as one ``ImageError`` that never echoes the decoder's text.
Truncation is noticed in every format. Damage inside the data is noticed as far as the format has checksums:
PNG has, JPEG has none, and its decoder conceals what it can.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin

from hired.errors import ConfigurationError, ImageError, ImageTooLargeError, UnreadableImageError
from hired.geometry import Tiling, fit
from hired.types import Box, Grid, Partitions, Size

# MPO is not listed: it opens as the JPEG that it begins with. HEIF is what phones call HEIC.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "HEIF")

# At most 1.2 GB while decoding: three copies at four bytes a pixel. WebP's own buffers make it 1.6 GB.
MAX_PIXELS = 100_000_000

# Resampling holds 32 bytes of weights for each pixel of a side, however thin the picture.
MAX_SIDE = 1_000_000

# Of a HEIF file whose pictures are coded as HEVC; one of others, AVIF among them, may call itself "mif1" too.
_HEVC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))

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
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))

Pixels: TypeAlias = NDArray[np.uint8]
_Opener: TypeAlias = Callable[[IO[bytes], str | bytes], ImageFile.ImageFile]


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A picture in RGB as its file stores it, and the turn that sets it upright.

    ``full_size`` is its size as stored. Where it was decoded at a smaller scale, ``width`` and ``height`` are
    fractions, in pixels of ``image``: the last column and row then reach over the picture's edge.
    """

    image: Image.Image
    turn: Image.Transpose | None
    full_size: Size
    width: float
    height: float

    @property
    def original_size(self) -> Size:
        """The upright picture's size."""
        return _turned(self.full_size, self.turn)

    def upright(self) -> Image.Image:
        return self.image if self.turn is None else self.image.transpose(self.turn)


def _turned(size: Size, turn: Image.Transpose | None) -> Size:
    """The same both ways: upright from stored, stored from upright."""
    return Size(size.width, size.height) if turn in _SIDEWAYS else size


def partition(
    image: bytes | Image.Image, tiling: Tiling, *, max_pixels: int = MAX_PIXELS, reduced: bool = False
) -> Partitions:
    """The full-image and the sub-images of one picture, from a file's bytes or a Pillow image.

    ``reduced`` trades equality with transformers' pixels for speed; grid, content and size stay the same.
    Raises ``UnreadableImageError`` and ``ImageTooLargeError``.
    """
    if isinstance(image, Image.Image):  # the caller's own: never decoded at another scale
        decoded = _decoded(image, max_pixels)
    else:
        decoded = _decoded(_opened(image), max_pixels, tiling if reduced else None)
    grid, content = _place(decoded.original_size, tiling)
    fitted, full_image = (_resized_nearly if reduced else _resized)(decoded, content, tiling.side)
    return Partitions(_cut(fitted, full_image, grid, content), grid, content, decoded.original_size)


def _place(original: Size, tiling: Tiling) -> tuple[Grid, Box]:
    """The grid for a picture of this size, and the picture's box on the canvas."""
    grid = tiling.grid(original)
    return grid, fit(original, Size(grid.rows * tiling.side, grid.cols * tiling.side))


def _cut(fitted: Pixels, full_image: Pixels, grid: Grid, content: Box) -> Pixels:
    """The partitions ``[k + 1, side, side, 3]``: the full-image, then the canvas around ``fitted``, cut."""
    side = len(full_image)
    pixels = np.zeros((grid.num_partitions, side, side, 3), np.uint8)
    pixels[0] = full_image
    for index, sub_image in enumerate(pixels[1:]):
        row, col = divmod(index, grid.cols)
        top, left = row * side - content.top, col * side - content.left  # counted on ``fitted``
        part = fitted[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
        above, before = max(-top, 0), max(-left, 0)
        sub_image[above : above + part.shape[0], before : before + part.shape[1]] = part
    return pixels


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file's bytes: RGB, upright, the first frame of several, transparency over white.

    Raises ``UnreadableImageError`` when the bytes are empty, of no supported format, truncated or corrupt,
    and ``ImageTooLargeError``, before decoding, when the header announces more than ``max_pixels``.
    """
    picture = _decoded(_opened(data), max_pixels).upright()
    if isinstance(picture, ImageFile.ImageFile):
        picture = picture.copy()  # without the decoder and its buffers
    picture.info = {}  # an orientation left here would have the next reader turn the picture again
    return picture


def _opened(data: bytes) -> Image.Image:
    """The picture behind its header, not decoded yet."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigurationError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so half pictures would pass for whole; unset it"
        )
    if not data:
        raise UnreadableImageError("the image is empty (0 bytes)")
    name, opener = _opener(data[:256])
    with _translated(name):
        return opener(io.BytesIO(data), "")


def _opener(head: bytes) -> tuple[str, _Opener]:
    """The format that the first bytes announce, and its reader.

    ``Image.open`` would do, but its limit on pixels is one for the whole process, set by whoever comes last.
    """
    if _is_heif(head):
        return "HEIF", _heif_opener()
    Image.init()
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        if opener and accepts and accepts(head) is True:
            return name, opener
    raise UnreadableImageError(f"not an image in a supported format ({', '.join(FORMATS)})")


def _is_heif(head: bytes) -> bool:
    """Whether the file's brands, the major one and those that it is compatible with, name HEVC pictures."""
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}
    return bool(brands & _HEVC_BRANDS) and head[8:12] not in (b"avif", b"avis")


def _heif_opener() -> _Opener:
    """The reader of HEIF; it turns pictures upright itself. Imported where needed, never registered."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise UnreadableImageError(
            "the image is HEIF (HEIC), which takes the package pillow-heif; install it"
        ) from error
    return HeifImageFile


def _decoded(image: Image.Image, max_pixels: int, reduced_for: Tiling | None = None) -> _Decoded:
    """The picture in RGB; it may be ``image`` itself, loaded.

    With ``reduced_for``, a JPEG is decoded at the smallest scale that this tiling allows.
    """
    header = image.size
    _check_limits(*header, max_pixels)
    with _translated(image.format or image.mode):
        scaled = _draft(image, reduced_for) if reduced_for else None
        if image.mode == "RGB":
            image.load()
        else:
            image = image.copy()  # frees the decoder's buffers before conversion takes its own
        turn = _turn(image)
        picture = _rgb(image)
        width, height = header if scaled else picture.size
        return _Decoded(picture, turn, Size(height, width), *(scaled or picture.size))


def _check_limits(width: int, height: int, max_pixels: int) -> None:
    if not width * height:
        raise UnreadableImageError(f"{width} x {height} pixels are no picture")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width} x {height} pixels exceed the limit of {max_pixels}; raise max_pixels to accept it"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(f"{width} x {height} pixels: no side may be longer than {MAX_SIDE}")


def _draft(image: Image.Image, tiling: Tiling) -> tuple[float, float] | None:
    """Have a JPEG decoded at the smallest scale that the tiling allows; its width and height then.

    None for other formats, which know no scales.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return None
    turn = _turn(image)
    _, content = _place(_turned(Size(image.height, image.width), turn), tiling)
    needed = _turned(_needed(content, tiling.side), turn)
    drafted = image.draft(None, (needed.width, needed.height))
    return drafted and drafted[1][2:]


def _needed(content: Box, side: int) -> Size:
    """Twice the larger of content and full-image, so that the resampling that follows still smooths."""
    return Size(2 * max(content.height, side), 2 * max(content.width, side))


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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the EXIF orientation asks for. Like every viewer, takes a broken EXIF block for none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


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


def _resized(decoded: _Decoded, content: Box, side: int) -> tuple[Pixels, Pixels]:
    """The picture at the content's size and as the full-image's square, as transformers resamples them."""
    picture = decoded.upright()
    # No pass is shared where both have one width: Pillow chooses by the shapes which side it resamples first.
    fitted = picture.resize((content.width, content.height), Image.Resampling.BICUBIC)
    full_image = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(fitted), np.asarray(full_image)


def _resized_nearly(decoded: _Decoded, content: Box, side: int) -> tuple[Pixels, Pixels]:
    """The same within a few levels, from a picture that is averaged down first where it is big enough."""
    needed = _turned(_needed(content, side), decoded.turn)
    by_width = max(1, int(decoded.width / needed.width))
    by_height = max(1, int(decoded.height / needed.height))
    image = decoded.image.reduce((by_width, by_height)) if by_width * by_height > 1 else decoded.image
    width, height = decoded.width / by_width, decoded.height / by_height
    import torch  # here, as a process that only decodes is ready ten times sooner without it

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    def resampled(size: Size) -> Pixels:
        stored = _turned(size, decoded.turn)
        # Scales, not sizes, as the last pixels may reach over the edge; what they give beyond it is cut off.
        # The trifle more keeps a product that should be whole from being rounded down.
        scales = [stored.height / height * (1 + 1e-9), stored.width / width * (1 + 1e-9)]
        scaled = torch.nn.functional.interpolate(pixels, scale_factor=scales, mode="bicubic", antialias=True)
        values = scaled[0, :, : stored.height, : stored.width].permute(1, 2, 0).numpy()
        return values if decoded.turn is None else np.asarray(Image.fromarray(values).transpose(decoded.turn))

    return resampled(Size(content.height, content.width)), resampled(Size(side, side))
