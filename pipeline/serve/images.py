"""Where a request's images come from: ``data:`` URIs, and https URLs of hosts that are allowed."""

from __future__ import annotations

import asyncio
import binascii
from concurrent.futures import ThreadPoolExecutor

from hired.errors import ImageTooLargeError, UnreadableImageError
from pipeline.fetching import Fetcher, FetchOptions, Resolver, UnsafeUrlError
from pipeline.serve.settings import Settings

MAX_FETCHES = 16


class ImageSource:
    """Gives the bytes of an image; never of a file, nor from a host that is not named in the settings."""

    def __init__(self, settings: Settings, *, resolver: Resolver | None = None) -> None:
        self._max_bytes = settings.limits.image_bytes
        options = FetchOptions(
            hosts=settings.https_hosts,
            https_only=True,
            public_only=True,
            timeout_s=settings.fetch_timeout_s,
            max_bytes=self._max_bytes,
            attempts=1,
        )
        self._fetcher = Fetcher(options, resolver=resolver) if settings.https_hosts else None
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "fetch")

    async def read(self, url: str) -> bytes:
        """The bytes; raises ImageError, FetchError or UnsafeUrlError."""
        if url[:5].lower() == "data:":
            return decoded(url, self._max_bytes)
        if self._fetcher is None:
            raise UnsafeUrlError("only data: URIs")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._fetcher.get, url)


def decoded(uri: str, max_bytes: int) -> bytes:
    """The bytes in a ``data:`` URI; raises UnreadableImageError or ImageTooLargeError."""
    head, comma, text = uri.partition(",")
    media_type, *parameters = head[5:].strip().lower().split(";")
    if not comma or "base64" not in (parameter.strip() for parameter in parameters):
        raise UnreadableImageError("the data: URI must read data:image/png;base64,... with the image's bytes")
    if media_type and not media_type.startswith("image/"):
        raise UnreadableImageError("the data: URI holds something other than an image")
    if len(text) * 3 // 4 > max_bytes + 2:
        raise ImageTooLargeError(f"the image has more than the {max_bytes} bytes that are allowed")
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise UnreadableImageError("the data: URI is not valid base64") from error
    if not data:
        raise UnreadableImageError("the data: URI is empty")
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"the image has more than the {max_bytes} bytes that are allowed")
    return data
