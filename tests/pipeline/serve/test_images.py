"""Images come from data: URIs and allowed hosts; everything else is refused before anything is sent."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
from collections.abc import Iterator

import pytest

from hired.errors import HiredError, ImageTooLargeError, UnreadableImageError
from pipeline.fetching import FetchError, UnsafeUrlError
from pipeline.serve import errors
from pipeline.serve.images import ImageSource, decoded
from pipeline.serve.settings import Limits, Settings

BASE64 = base64.b64encode(b"bytes of an image").decode()
LIMIT = 10_000


@pytest.mark.parametrize(
    "head", ["data:image/png;base64", "DATA:image/jpeg;charset=x;BASE64", "data:;base64"]
)
def test_a_data_uri_gives_its_bytes(head: str) -> None:
    assert decoded(f"{head},{BASE64}", LIMIT) == b"bytes of an image"


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:image/png",
        "data:image/png;base64",
        "data:image/png;base64,",
        f"data:image/png,{BASE64}",
        f"data:text/html;base64,{BASE64}",
        f"data:image/png;base64,{BASE64[:-1]}",
        f"data:image/png;base64,{BASE64}\n",
        "data:image/png;base64,a-_a",
        "data:image/png;base64,äää=",
    ],
)
def test_other_data_uris_are_unreadable_images(uri: str) -> None:
    with pytest.raises(UnreadableImageError):
        decoded(uri, LIMIT)


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + 3, 10 * LIMIT])
def test_larger_ones_are_refused(size: int) -> None:
    with pytest.raises(ImageTooLargeError):
        decoded("data:image/png;base64," + base64.b64encode(bytes(size)).decode(), LIMIT)
    assert len(decoded("data:image/png;base64," + base64.b64encode(bytes(LIMIT)).decode(), LIMIT)) == LIMIT


# What names resolve to in these tests, as an attacker's name server would have it.
NAMES = {
    "loopback.example": ["127.0.0.1"],
    "private.example": ["10.1.2.3"],
    "link-local.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "six.example": ["::1"],
    "unique-local.example": ["fd00:ec2::254"],
    "both.example": ["93.184.215.14", "127.0.0.1"],
    "zero.example": ["0.0.0.0"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "shared.example": ["100.64.0.1"],
}
HOSTILE = [
    # No https, or no URL of the web at all.
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "/etc/passwd",
    "http://allowed.example/a.png",
    "ftp://allowed.example/a.png",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "s3://bucket/key.png",
    "//127.0.0.1/a.png",
    "javascript:alert(1)",
    "https:///a.png",
    "",
    " ",
    "https://",
    # Addresses, however they are written.
    "https://127.0.0.1/",
    "https://127.0.0.1:8000/v1/models",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1./",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:169.254.169.254]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[fe80::1%25eth0]/",
    "https://[fd00:ec2::254]/latest/meta-data/",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://0/",
    "https://255.255.255.255/",
    "https://224.0.0.1/",
    "https://localhost/",
    "https://localhost.localdomain/",
    "https://metadata.google.internal/",
    # User names and other tricks around the host.
    "https://allowed.example@127.0.0.1/",
    "https://allowed.example:password@127.0.0.1/",
    "https://user@allowed.example/",
    "https://allowed.example%40127.0.0.1/",
    "https://allowed.example\\@127.0.0.1/",
    "https://127.0.0.1\\@allowed.example/",
    "https://127.0.0.1#@allowed.example/",
    "https://127.0.0.1?@allowed.example/",
    "https://allowed.example.127.0.0.1.nip.io/",
    "https://evil.example/",
    "https://allowed.example.evil.example/",
    "https://notallowed.example/",
    "https://allowed.example:99999/",
    "https://\uff11\uff12\uff17.0.0.1/",
    "https://\u2488\u2488/",
    "https://allowed.example\t.evil.example/",
    "https://allowed.example\r\nHost: evil/",
    # Names that resolve to such addresses, though they are allowed.
    *(f"https://{name}/a.png" for name in NAMES),
]


@pytest.fixture(scope="module")
def listener() -> Iterator[list[str]]:
    """What anybody says to this machine's port 443, if the test may have it, and to another one."""
    heard: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        ends = threading.Event()

        def listen() -> None:
            while not ends.is_set():
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    continue
                heard.append(str(address))
                connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        heard_at = [f"127.0.0.1:{server.getsockname()[1]}"]
        try:
            yield heard_at
        finally:
            ends.set()
            thread.join()
    assert not heard, "somebody connected"


def source(*hosts: str) -> ImageSource:
    settings = Settings(https_hosts=("allowed.example", *hosts), limits=Limits(image_bytes=LIMIT))
    return ImageSource(settings, resolver=lambda host, _: NAMES.get(host, ["93.184.215.14"]))


@pytest.mark.parametrize("url", HOSTILE)
def test_urls_that_lead_inside_are_refused(url: str) -> None:
    with pytest.raises(UnsafeUrlError) as raised:
        asyncio.run(source(*NAMES).read(url))
    told = errors.of_image(raised.value, "messages[0].content[0].image_url")
    assert told is not None
    assert (told.status, told.code) == (400, "unsafe_url")
    assert "127" not in told.message


def test_names_of_this_machine_are_never_connected_to(listener: list[str]) -> None:
    [address] = listener
    port = address.rpartition(":")[2]
    for host in ("loopback.example", "both.example", "mapped.example"):
        with pytest.raises(UnsafeUrlError):
            asyncio.run(source(*NAMES).read(f"https://{host}:{port}/a.png"))


def test_without_allowed_hosts_there_are_data_uris_only() -> None:
    plain = ImageSource(Settings())
    for url in ("https://allowed.example/a.png", *HOSTILE):
        with pytest.raises((UnsafeUrlError, UnreadableImageError)):
            asyncio.run(plain.read(url))
    assert asyncio.run(plain.read(f"data:image/png;base64,{BASE64}")) == b"bytes of an image"


def test_what_a_server_or_a_resolver_says_stays_out_of_the_answer() -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise OSError(f"nameserver 10.1.1.1 does not know {host}")

    plain = ImageSource(Settings(https_hosts=("allowed.example",)), resolver=resolver)
    with pytest.raises(HiredError) as raised:
        asyncio.run(plain.read("https://allowed.example/a.png"))
    assert isinstance(raised.value, FetchError)
    told = errors.of_image(raised.value, "here")
    assert told is not None
    assert "10.1.1.1" not in told.message
