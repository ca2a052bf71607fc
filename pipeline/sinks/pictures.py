"""The pictures of a shard, read once more for the formats that hold them.

A picture may be gone since it was captioned. Its caption is kept, the failure is logged and noted wherever
the format has a place for it; but when most of a shard are gone something larger is wrong, and the run ends
before it writes files without pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby

from pipeline.columns import Failure
from pipeline.rows import Item
from pipeline.sinks.shard import Images, Shard, SinkError

log = logging.getLogger(__name__)

MOST = 0.5

# By what files begin with: a name may say something else, and a header is not worth a decoder's risks.
_MAGIC = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\x00", "tif"),
    (0, b"MM\x00*", "tif"),
    (4, b"ftypavi", "avif"),
    (4, b"ftyphei", "heic"),
    (4, b"ftyphev", "heic"),
    (4, b"ftypmif1", "heic"),
    (4, b"ftypmsf1", "heic"),
    (0, b"P1", "pbm"),
    (0, b"P4", "pbm"),
    (0, b"P2", "pgm"),
    (0, b"P5", "pgm"),
    (0, b"P3", "ppm"),
    (0, b"P6", "ppm"),
)


def suffix(image: bytes) -> str:
    """The suffix of the format that the bytes are in, ``bin`` for one that is not known."""
    return next((name for start, magic, name in _MAGIC if image.startswith(magic, start)), "bin")


def pictures(shard: Shard, images: Images) -> Iterator[tuple[int, Item, bytes | Failure]]:
    """Every row of the shard that has a caption, in order: its number, itself, and its picture's bytes.

    Raises SinkError at the end if most of them could not be read.
    """
    indices = [index for index, _ in groupby(shard.captions["index"].to_pylist())]
    items = shard.items(indices)
    num_failed, last = 0, ""
    for index, item, image in zip(indices, items, images(items), strict=True):
        if isinstance(image, Failure):
            num_failed, last = num_failed + 1, f"{item.path}: {image.error_type}: {image.error}"
            log.warning("%s was captioned, but its image cannot be read again: %s", item.key, last)
        yield index, item, image
    if num_failed > MOST * len(indices):
        raise SinkError(
            f"{num_failed} of the {len(indices)} captioned images of shard {shard.number} cannot be read "
            f"again, the last one {last}; bring the input back and start the same command again"
        )
