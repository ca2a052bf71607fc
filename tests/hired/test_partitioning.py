"""Partitioning against transformers' own image processor, and decoding against every kind of file."""

from __future__ import annotations

import io
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hired.errors import ConfigurationError, ImageError, ImageTooLargeError, UnreadableImageError
from hired.geometry import Tiling
from hired.partitioning import MAX_PIXELS, MAX_SIDE, decode, partition
from hired.types import Box, Grid, Partitions, Size
from tests.pictures import gif_bomb, picture, png, png_bomb, saved, turned

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tiling(side: int, patch_size: int, *grids: tuple[int, int]) -> Tiling:
    return Tiling(side, patch_size, tuple(Size(rows * side, cols * side) for rows, cols in grids))


LLAVA_NEXT = tiling(336, 14, (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SMALL = tiling(24, 8, (2, 2), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 3))
TINY = tiling(8, 4, (2, 2))  # so small that every picture is reduced

# What the corpus of hostile files must come to, by the beginning of the file's name; all others are pictures.
REFUSED = {
    "corrupt-header.jpg": "the JPEG image is truncated or corrupt",
    "empty.jpg": "the image is empty (0 bytes)",
    "not-an-image.png": "not an image in a supported format",
    "truncated.jpg": "the JPEG image is truncated or corrupt",
    "truncated.png": "the PNG image is truncated or corrupt",
    "fuzz-": "",
    "pngsuite-xc1": "the PNG image is truncated or corrupt",
    "pngsuite-xcr": "not an image in a supported format",
    "pngsuite-xd": "the PNG image is truncated or corrupt",
    "pngsuite-xh": "the PNG image is truncated or corrupt",
    "pngsuite-xs": "not an image in a supported format",
    "65536-uint32-limit.png": "65536 x 65536 pixels exceed the limit of 100000000; raise max_pixels",
    "giant-image.jpg": "20000 x 14000 pixels exceed the limit of 100000000; raise max_pixels",
}
# Broken JPEGs whose decoder conceals the damage: JPEG has no checksum to tell them by.
CONCEALED = {"fuzz-20.jpg", "fuzz-24.jpg", "fuzz-25.jpg"}


def pixels(image: Image.Image) -> NDArray[np.int16]:
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int16)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures' levels, over what 32 x 32 pixels show of them."""
    small = [pixels(image.resize((32, 32), Image.Resampling.BOX)) for image in (a, b)]
    return float(abs(small[0] - small[1]).mean())


def processed(image: Image.Image, tiling: Tiling, *, normalised: bool = False) -> NDArray[Any]:
    """transformers' partitions ``[k + 1, side, side, 3]`` of a picture."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tiling.side},
        crop_size={"height": tiling.side, "width": tiling.side},
        image_grid_pinpoints=[[size.height, size.width] for size in tiling.pinpoints],
        do_rescale=normalised,
        do_normalize=normalised,
    )
    values: NDArray[Any] = processor(image, return_tensors="np")["pixel_values"][0]
    return values.transpose(0, 2, 3, 1)


# Partitions


@settings(max_examples=150)
@given(st.integers(1, 120), st.integers(1, 120))
@example(1, 1)
@example(100, 1)
@example(1, 100)
@example(47, 48)
def test_partitions_equal_those_of_transformers(width: int, height: int) -> None:
    image = picture(width, height, noise=60)
    np.testing.assert_array_equal(partition(image, SMALL).pixels, processed(image, SMALL))


@pytest.mark.parametrize(
    "size", [(640, 480), (500, 333), (333, 500), (1400, 300), (37, 1100), (672, 672), (20, 21), (1, 700)]
)
def test_partitions_equal_those_of_transformers_at_full_scale(size: tuple[int, int]) -> None:
    image = picture(*size, noise=60)
    np.testing.assert_array_equal(partition(image, LLAVA_NEXT).pixels, processed(image, LLAVA_NEXT))


def test_normalised_partitions_equal_those_of_transformers() -> None:
    image = picture(500, 333, noise=60)
    ours = (partition(image, LLAVA_NEXT).pixels / 255.0 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(ours, processed(image, LLAVA_NEXT, normalised=True), atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_eight_bits_becomes_the_rgb_of_transformers(mode: str) -> None:
    image = picture()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode) if mode in ("LA", "PA", "RGBA") else image.convert("RGB").convert(mode)
    np.testing.assert_array_equal(partition(image, SMALL).pixels, processed(image, SMALL))


def test_photographs_and_documents_come_out_as_transformers_has_them(corpus: Path) -> None:
    files = sorted(corpus.glob("photos/*"))[::5] + sorted(corpus.glob("documents/*.jpg"))[::10]
    assert files
    for path in files:
        with Image.open(path) as image:
            expected = processed(image, LLAVA_NEXT)
        np.testing.assert_array_equal(partition(path.read_bytes(), LLAVA_NEXT).pixels, expected, path.name)


def test_the_full_image_comes_first_then_the_sub_images_in_raster_order() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    image = Image.fromarray(colours.repeat(48, axis=0).repeat(48, axis=1))
    cut = partition(image, tiling(48, 8, (2, 2)))
    assert cut.pixels.shape == (5, 48, 48, 3)
    for sub_image, colour in zip(cut.pixels[1:], colours.reshape(4, 3), strict=True):
        assert (sub_image == colour).all()
    assert difference(Image.fromarray(cut.pixels[0]), image) < 2


def test_a_wide_picture_is_centred_between_black_bars() -> None:
    cut = partition(Image.new("RGB", (80, 20), "white"), tiling(40, 8, (2, 2)))
    assert (cut.grid, cut.canvas, cut.original_size) == (Grid(2, 2), Size(80, 80), Size(20, 80))
    assert cut.content == Box(30, 0, 50, 80)
    canvas = cut.pixels[1:].reshape(2, 2, 40, 40, 3).swapaxes(1, 2).reshape(80, 80, 3)
    assert (canvas[30:50] == 255).all()
    assert not canvas[:30].any()
    assert not canvas[50:].any()
    assert (cut.pixels[0] == 255).all()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (3, 1), (1000, 10), (10, 1000), (1, 5000), (5000, 1), (65535, 1)]
)
def test_the_smallest_and_the_thinnest_pictures_are_cut_like_any_other(size: tuple[int, int]) -> None:
    cut = partition(saved(Image.new("RGB", size, (200, 100, 50)), "PNG"), LLAVA_NEXT)
    assert cut.original_size == Size(size[1], size[0])
    assert (cut.pixels[0] == (200, 100, 50)).all()
    assert (cut.pixels[1:] == (200, 100, 50)).all(axis=-1).sum() == cut.content.area


# Reduced


def levels_apart(data: bytes, tiling: Tiling) -> NDArray[np.int16]:
    """How far the reduced partitions are from the exact ones, which have the same grid, content and size."""
    exact, reduced = partition(data, tiling), partition(data, tiling, reduced=True)
    for name in ("grid", "content", "original_size"):
        assert getattr(exact, name) == getattr(reduced, name)
    return abs(exact.pixels.astype(np.int16) - reduced.pixels.astype(np.int16))


@given(st.integers(1, 24), st.integers(1, 24))
@example(1, 1)
@example(24, 1)
def test_reduced_partitions_of_enlarged_pictures_differ_by_rounding_only(width: int, height: int) -> None:
    apart = levels_apart(saved(picture(width, height, noise=60), "PNG"), SMALL)
    assert apart.max() <= 2
    assert apart.mean() < 0.05


def test_reduced_partitions_of_photographs_and_documents_stay_close(corpus: Path) -> None:
    files = sorted(corpus.glob("photos/*"))[::5] + sorted(corpus.glob("documents/*.jpg"))[::10]
    assert files
    for path in files:
        assert levels_apart(path.read_bytes(), LLAVA_NEXT).mean() < 0.2, path.name  # 0.06 at most, measured


@settings(max_examples=40)
@given(
    st.integers(24, 1500), st.integers(24, 1500), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(1, 8)
)
@example(1151, 1149, "JPEG", 3)
@example(1151, 1149, "JPEG", 6)
@example(1151, 1149, "PNG", 8)
@example(1500, 40, "JPEG", 5)
def test_reduced_partitions_keep_every_pixel_in_its_place(
    width: int, height: int, file_format: str, orientation: int
) -> None:
    waves = 127.5 + 127.5 * np.sin(np.indices((height, width)).sum(0) * 20 / max(width, height))
    image = Image.fromarray(np.stack([waves] * 3, axis=-1).astype(np.uint8))
    apart = levels_apart(turned(image, orientation, file_format, quality=95), SMALL)
    assert apart.mean() < 2  # half a pixel's shift makes more than ten


@pytest.fixture
def loaded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Width and height of every JPEG as it is decoded."""
    sizes: list[tuple[int, int]] = []
    load = JpegImagePlugin.JpegImageFile.load

    def recorded(self: JpegImagePlugin.JpegImageFile) -> object:
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", recorded)
    return sizes


@pytest.mark.parametrize(
    ("size", "orientation", "scale"),
    [
        ((300, 290), 1, 2),  # content 48 x 47 on a canvas of 48 x 48, so 96 x 94 are needed
        ((383, 383), 1, 2),
        ((384, 384), 1, 4),
        ((768, 768), 1, 8),
        ((1700, 1700), 1, 8),
        ((95, 95), 1, 1),
        ((1000, 100), 1, 2),  # the full-image needs 48 rows, however few the content has
        ((100, 1000), 6, 2),
    ],
)
def test_a_reduced_jpeg_is_decoded_at_the_smallest_scale_of_twice_what_is_needed(
    size: tuple[int, int], orientation: int, scale: int, loaded_sizes: list[tuple[int, int]]
) -> None:
    image = picture(*size)
    data = turned(image, orientation)
    stored = image.size if orientation == 1 else image.size[::-1]
    cut = partition(data, tiling(24, 8, (2, 2)), reduced=True)
    assert set(loaded_sizes) == {(-(-stored[0] // scale), -(-stored[1] // scale))}
    assert cut.original_size == Size(size[1], size[0])


def test_a_pillow_image_that_is_still_closed_is_not_decoded_smaller_for_its_owner(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(picture(900, 600), "JPEG"))
    with Image.open(tmp_path / "a.jpg") as image:
        cut = partition(image, SMALL, reduced=True)
        assert image.size == (900, 600)
        assert np.asarray(image).shape == (600, 900, 3)
    assert cut.original_size == Size(600, 900)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
def test_a_truncated_jpeg_is_refused_at_a_smaller_scale_too(share: float, progressive: bool) -> None:
    whole = saved(picture(900, 600, noise=40), "JPEG", progressive=progressive)
    with pytest.raises(UnreadableImageError, match="the JPEG image is truncated or corrupt"):
        partition(whole[: int(share * len(whole))], SMALL, reduced=True)


def test_the_limit_on_pixels_counts_those_of_the_header_not_those_decoded() -> None:
    data = saved(picture(900, 600), "JPEG")
    assert partition(data, SMALL, reduced=True, max_pixels=540_000).original_size == Size(600, 900)
    with pytest.raises(ImageTooLargeError, match="900 x 600 pixels exceed the limit of 539999"):
        partition(data, SMALL, reduced=True, max_pixels=539_999)


# Kinds of files


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("MPO", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("AVIF", {"quality": 95}),
        ("PPM", {}),
    ],
)
def test_every_supported_format_is_read(file_format: str, options: dict[str, object]) -> None:
    image = picture()
    decoded = decode(saved(image, file_format, **options))
    assert type(decoded) is Image.Image  # no decoder, with buffers of its own, hangs on it
    assert decoded.size == image.size
    assert difference(decoded, image) < 3


@pytest.mark.parametrize("file_format", ["ICO", "TGA", "PCX", "JPEG2000", "EPS", "PDF"])
def test_formats_outside_the_list_are_refused_though_pillow_knows_them(file_format: str) -> None:
    with pytest.raises(UnreadableImageError, match=r"not an image in a supported format \(JPEG, PNG,"):
        decode(saved(picture(), file_format))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(9))
def test_pictures_stand_upright_whatever_their_exif_orientation(orientation: int, file_format: str) -> None:
    image = picture()
    decoded = decode(turned(image, orientation, file_format, quality=95))
    assert decoded.size == image.size
    assert difference(decoded, image) < 4


def test_a_picture_is_turned_once_also_when_it_is_handed_on_as_a_pillow_image() -> None:
    image = picture()
    data = turned(image, 6, "PNG")
    once = decode(data)
    assert once.getexif().get(0x0112) is None
    np.testing.assert_array_equal(partition(once, SMALL).pixels, partition(image, SMALL).pixels)
    np.testing.assert_array_equal(partition(data, SMALL).pixels, partition(image, SMALL).pixels)


def test_a_pillow_image_that_was_never_turned_is_turned_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(turned(picture(), 8, "PNG"))
    with Image.open(tmp_path / "a.png") as image:
        cut = partition(image, SMALL)
        assert image.size == (60, 90)
        assert image.getexif()[0x0112] == 8
    np.testing.assert_array_equal(cut.pixels, partition(picture(), SMALL).pixels)


def test_an_upright_pillow_image_keeps_its_own_notes() -> None:
    image = picture()
    image.info["dpi"] = (300, 300)
    partition(image, SMALL)
    assert image.info == {"dpi": (300, 300)}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_leaves_the_picture_as_it_is_stored() -> None:
    decoded = decode(saved(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"))
    np.testing.assert_array_equal(pixels(decoded), pixels(picture()))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode: str) -> None:
    image = Image.new(mode, (3, 1), "black")
    image.putalpha(Image.frombytes("L", (3, 1), bytes([0, 128, 255])))
    assert pixels(decode(saved(image, "PNG")))[0, :, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_palette_is_looked_up_and_its_transparent_colour_lies_over_white(file_format: str) -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    opaque = pixels(decode(saved(image, file_format)))
    assert opaque.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    transparent = pixels(decode(saved(image, file_format, transparency=1)))
    assert transparent.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_palette_with_many_alphas_lies_over_white() -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([0, 0, 0] * 3)
    decoded = pixels(decode(saved(image, "PNG", transparency=bytes([0, 128, 255]))))
    assert decoded[0, :, 0].tolist() == [255, 127, 0]


def test_cmyk_becomes_rgb() -> None:
    image = picture()
    assert difference(decode(saved(image.convert("CMYK"), "JPEG", quality=95)), image) < 4


def test_sixteen_bits_of_grey_keep_their_upper_eight() -> None:
    levels = [0, 255, 256, 0x80FF, 0xFFFF]
    expected = [0, 0, 1, 128, 255]
    rows = b"\0" + struct.pack(">5H", *levels)
    files = {
        "PNG": png(5, 1, 16, 0, rows),
        "TIFF": saved(Image.fromarray(np.array([levels], np.uint16)), "TIFF"),
        "TIFF, big-endian": saved(Image.frombytes("I;16B", (5, 1), rows[1:]), "TIFF"),
        "PPM": b"P5 5 1 65535\n" + rows[1:],
    }
    for name, data in files.items():
        decoded = pixels(decode(data))
        assert (decoded == decoded[..., :1]).all(), name
        assert decoded[0, :, 0].tolist() == expected, name


def test_sixteen_bits_of_colour_keep_their_upper_eight() -> None:
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF))
    assert pixels(decode(data)).tolist() == [[[0x12, 0x80, 0xFF]]]


def test_sixteen_bits_of_grey_with_a_transparent_level_lie_over_white() -> None:
    rows = b"\0" + struct.pack(">3H", 0, 0x8000, 0x8001)
    data = png(3, 1, 16, 0, rows, tRNS=struct.pack(">H", 0x8000))
    assert pixels(decode(data))[0, :, 0].tolist() == [0, 255, 0x80]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.array([[0, -1]], np.int32), "32-bit pixels"),
        (np.array([[0, 70_000]], np.int32), "32-bit pixels"),
        (np.array([[0.0, 1.0]], np.float32), "floating-point pixels"),
    ],
)
def test_pixels_without_a_defined_white_are_refused(samples: NDArray[np.generic], words: str) -> None:
    with pytest.raises(UnreadableImageError, match=words):
        decode(saved(Image.fromarray(samples), "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    decoded = decode(saved(red, file_format, save_all=True, append_images=[blue, blue], duration=100))
    assert difference(decoded, red) < 2


# HEIF


def heif(image: Image.Image, exif: Image.Exif | None = None) -> bytes:
    file = pillow_heif.from_pillow(image)
    if exif:
        file.info["exif"] = exif.tobytes()  # is turned into the file's own rotation
    buffer = io.BytesIO()
    file.save(buffer, quality=90)
    return buffer.getvalue()


def test_a_phones_picture_is_read_without_registering_anything_in_pillow() -> None:
    assert difference(decode(heif(picture())), picture()) < 3
    assert "HEIF" not in Image.OPEN


def test_a_heif_file_that_calls_itself_by_the_container_is_no_avif() -> None:
    data = bytearray(heif(picture()))
    assert data[4:12] == b"ftypheic"
    data[8:12] = b"mif1"
    assert difference(decode(bytes(data)), picture()) < 3
    avif = bytearray(FILES["AVIF"])
    assert avif[4:12] == b"ftypavif"
    avif[8:12] = b"mif1"
    assert difference(decode(bytes(avif)), picture()) < 12  # it was noisy


def test_a_heif_picture_that_was_held_sideways_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    upright = decode(heif(stored, exif))
    assert upright.size == (90, 60)
    assert difference(upright, picture()) < 3


def test_transparency_in_heif_lies_over_white() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert pixels(decode(heif(image))).min() > 250


def test_without_its_package_heif_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImageError, match=r"HEIF .* pillow-heif; install it"):
        decode(FILES["HEIF"])


# Hostile files


@pytest.mark.parametrize("reduced", [False, True])
def test_the_hostile_corpus_comes_to_pictures_or_to_errors_that_say_what_is_wrong(
    corpus: Path, reduced: bool
) -> None:
    outcomes: dict[str, str | Partitions] = {}
    for path in sorted((corpus / "hostile").iterdir()):
        try:
            outcomes[path.name] = partition(path.read_bytes(), SMALL, reduced=reduced)
        except ImageError as error:
            outcomes[path.name] = str(error)

    for name, outcome in outcomes.items():
        refusal = next((words for start, words in REFUSED.items() if name.startswith(start)), None)
        if refusal is None or name in CONCEALED:
            assert isinstance(outcome, Partitions), f"{name} is a good picture, but: {outcome}"
        else:
            assert isinstance(outcome, str), f"{name} was taken for a picture"
            assert outcome.startswith(refusal), name
    assert sum(isinstance(outcome, str) for outcome in outcomes.values()) >= 9


def test_the_exif_photographs_of_the_corpus_all_look_upright(corpus: Path) -> None:
    for name in ("Landscape", "Portrait"):
        upright = decode((corpus / f"hostile/exif-{name}_1.jpg").read_bytes())
        files = sorted(corpus.glob(f"hostile/exif-{name}_*.jpg"))
        assert len(files) >= 7
        for path in files:
            decoded = decode(path.read_bytes())
            assert decoded.size == upright.size, path.name
            # The photographs differ by a caption; a wrong turn would differ by far more.
            wrong = min(difference(decoded.transpose(turn), upright) for turn in Image.Transpose)
            assert difference(decoded, upright) < min(10, wrong / 3), path.name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\0", "not an image in a supported format"),
        (b"<html>404 Not Found</html>", "not an image in a supported format"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "the JPEG image is truncated or corrupt"),
        (b"\x89PNG\r\n\x1a\n", "the PNG image is truncated or corrupt"),
        (b"GIF89a", "the GIF image is truncated or corrupt"),
        (b"BM" + bytes(10), "the BMP image is truncated or corrupt"),
        (b"II*\0" + bytes(3), "the TIFF image is truncated or corrupt"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(4), "the WEBP image is truncated or corrupt"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "the AVIF image is truncated or corrupt"),
        (b"P6 10 10 255\n", "the PPM image is truncated or corrupt"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "the HEIF image is truncated or corrupt"),
        (png(8, 8, 99, 2, bytes(1000)), "the PNG image is truncated or corrupt"),
    ],
)
def test_what_is_not_a_whole_picture_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(UnreadableImageError, match=words):
        decode(data)


FILES = {
    "JPEG": saved(picture(noise=40), "JPEG"),
    "JPEG, progressive": saved(picture(noise=40), "JPEG", progressive=True),
    "PNG": saved(picture(noise=40), "PNG"),
    "GIF": saved(picture(noise=40), "GIF"),
    "WEBP": saved(picture(noise=40), "WEBP"),
    "BMP": saved(picture(), "BMP"),
    "TIFF": saved(picture(), "TIFF"),
    "AVIF": saved(picture(noise=40), "AVIF"),
    "PPM": saved(picture(), "PPM"),
    "HEIF": heif(picture(noise=40)),
}


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_a_picture_cut_off_anywhere_is_refused_unless_all_its_pixels_arrived(name: str, share: float) -> None:
    whole = FILES[name]
    try:
        decoded = decode(whole[: int(share * len(whole))])
    except UnreadableImageError:
        return
    assert share > 0.9
    np.testing.assert_array_equal(pixels(decoded), pixels(decode(whole)))


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))),
    st.booleans(),
)
def test_a_damaged_file_gives_a_picture_or_an_image_error(
    name: str, damage: list[tuple[float, int]], reduced: bool
) -> None:
    data = bytearray(FILES[name])
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        cut = partition(bytes(data), TINY, max_pixels=100_000, reduced=reduced)
        outcome = "RGB" if cut.pixels.shape == (5, 8, 8, 3) else "misshapen"
    except ImageError as error:
        outcome = str(error)
    assert re.fullmatch(
        r"RGB|not an image in a supported format \(.*\)"
        r"|\d+ x \d+ pixels (are no picture|exceed .*)|\d+ x \d+ pixels: .*"
        r"|the [A-Z]+ image (is truncated or corrupt|asks for more memory than there is)"
        r"|(32-bit|floating-point) pixels have no defined white; .*",
        outcome,
    )


@pytest.mark.parametrize("empty", [Image.new("RGB", (0, 7)), b"P6 0 7 255\n", gif_bomb(0, 0)[:13] + b";"])
def test_a_picture_without_pixels_is_refused(empty: Image.Image | bytes) -> None:
    with pytest.raises(UnreadableImageError):
        partition(empty, SMALL)


def test_damage_inside_a_png_is_noticed_by_its_checksum() -> None:
    data = bytearray(FILES["PNG"])
    data[len(data) // 2] ^= 1
    with pytest.raises(UnreadableImageError, match="the PNG image is truncated or corrupt"):
        decode(bytes(data))


def test_the_decoders_own_words_stay_out_of_the_message_and_in_the_cause() -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode(FILES["JPEG"][:-100])
    assert str(caught.value) == "the JPEG image is truncated or corrupt"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    "error", [RecursionError, ZeroDivisionError, struct.error, SyntaxError, AssertionError]
)
def test_whatever_a_decoder_raises_comes_out_as_an_image_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise error("secret at 0x7f00")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UnreadableImageError, match=r"^the PNG image is truncated or corrupt$"):
        decode(FILES["PNG"])


def test_a_decoder_out_of_memory_costs_the_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageTooLargeError, match="asks for more memory than there is"):
        decode(FILES["PNG"])


# Size limits


@pytest.fixture
def undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to decode pixels fails."""

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.usefixtures("undecodable")
@pytest.mark.parametrize(
    "data", [png_bomb(65_535, 65_536), gif_bomb(65_535, 65_000), png_bomb(10_000, 10_001)]
)
def test_decompression_bombs_are_refused_from_the_header(data: bytes) -> None:
    with pytest.raises(
        ImageTooLargeError, match=rf"pixels exceed the limit of {MAX_PIXELS}; raise max_pixels"
    ):
        decode(data)


@pytest.mark.usefixtures("undecodable")
def test_a_picture_too_long_to_resample_is_refused_from_the_header() -> None:
    with pytest.raises(ImageTooLargeError, match=f"no side may be longer than {MAX_SIDE}"):
        decode(png_bomb(MAX_SIDE + 1, 1))


def test_the_limit_on_pixels_is_the_callers() -> None:
    image = picture(30, 20)
    for given_image in (image, saved(image, "PNG")):
        assert partition(given_image, SMALL, max_pixels=600).original_size == Size(20, 30)
        with pytest.raises(
            ImageTooLargeError, match="30 x 20 pixels exceed the limit of 599; raise max_pixels"
        ):
            partition(given_image, SMALL, max_pixels=599)


def test_pillows_process_wide_limit_is_neither_obeyed_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(FILES["PNG"]).size == (90, 60)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_half_pictures_are_not_let_through_by_pillows_process_wide_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigurationError, match="LOAD_TRUNCATED_IMAGES"):
        decode(FILES["JPEG"])
