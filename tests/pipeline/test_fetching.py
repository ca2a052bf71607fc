"""Fetching: every disguise of a private address is refused, and real servers of every temper are survived."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hired.errors import HiredError
from pipeline import fetching
from pipeline.fetching import (
    BodyTooLargeError,
    Fetcher,
    FetchError,
    FetchOptions,
    UnsafeUrlError,
    is_private,
    is_public,
)

BODY = bytes(range(256)) * 40


# Servers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        action = self.server.actions.get(self.path.partition("?")[0], Handler.missing)
        action(self)

    def answer(self, status: int = 200, body: bytes = BODY, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def missing(self) -> None:
        self.answer(404, b"secret words of the server")

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.actions: dict[str, Callable[[Handler], None]] = {"/good": Handler.answer}
        self.requests: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, *_: Any) -> None:
        """Clients that turn away are what the tests are about."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, path: str = "/good", host: str = "images.test") -> str:
        return f"http://{host}:{self.port}{path}"


def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from running(Server())


@pytest.fixture
def waits() -> list[float]:
    return []


class Names:
    """Resolves from a table, and counts how often it is asked."""

    def __init__(self, **table: str | list[str]) -> None:
        self.table = {name.replace("_", "."): value for name, value in table.items()}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.table:
            raise socket.gaierror("secret.internal: no such name")
        found = self.table[host]
        return [found] if isinstance(found, str) else found


NAMES = {"images_test": "127.0.0.1", "other_test": "127.0.0.1"}


@pytest.fixture
def fetcher(waits: list[float]) -> Iterator[Fetcher]:
    """Trusts the names of the servers above."""
    options = FetchOptions(hosts=("images.test", "Other.Test."), timeout_s=10, max_bytes=100_000)
    with closing(Fetcher(options, resolver=Names(**NAMES), sleep=waits.append)) as one:
        yield one


def refused(url: str, **options: Any) -> str:
    """Why a URL is not opened; fails when anything is connected to."""
    names = Names(**{"images_test": "127.0.0.1"} | options.pop("names", {}))
    with (
        closing(Fetcher(FetchOptions(**options), resolver=names, sleep=lambda _: None)) as one,
        pytest.raises(UnsafeUrlError) as caught,
    ):
        one.get(url)
    assert not caught.value.retryable
    return str(caught.value)


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.8",
        "192.0.2.1",
        "192.88.99.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "::ffff:0:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::a00:1",
        "64:ff9b:1::8.8.8.8",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2002:c0a8:101::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "3fff::1",
        "100::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "2606:4700::5efe:127.0.0.1",
        "2606:4700::200:5efe:10.0.0.1",
        "5f00::1",
    ],
)
def test_an_address_that_is_not_the_internets_is_refused_in_every_form(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
    assert "not on the public internet" in refused(url)
    assert "not on the public internet" in refused("http://trap.test/", names={"trap_test": address})


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.32.0.1",
        "2606:4700:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
    ],
)
def test_an_address_of_the_internet_is_not(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_one_private_address_among_public_ones_is_enough_to_refuse_a_name() -> None:
    assert "public internet" in refused("http://trap.test/", names={"trap_test": ["8.8.8.8", "10.0.0.1"]})


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "127.0.0.1", "::1", "fd12::1", "::ffff:10.0.0.1"],
)
def test_a_host_that_is_trusted_by_name_may_lie_on_a_private_address(address: str) -> None:
    assert is_private(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "100.100.100.200",
        "fd00:ec2::254",
        "fe80::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_no_trust_reaches_where_clouds_keep_a_machines_keys(address: str) -> None:
    assert "public internet" in refused(
        "http://images.test/", hosts=("images.test",), names={"images_test": address}
    )


# Spellings


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        "127.0.1",
        "127.0.0.1.",
        "1.2.3.4.5",
        "0",
        "00",
        "127.0.0.0x1",
        "[fe80::1%25eth0]",
        "[::1%251]",
        "%31%32%37.0.0.1",
        "a%20b",
        "example.com\\.evil",
        "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
        "-x.test",
        "ⓛocalhost",
        "[v1.x]",
        "..",
        "example..com",
    ],
)
def test_hosts_that_only_some_readers_take_for_an_address_are_refused(host: str) -> None:
    assert re.match("the URL('s host|'s port)? (is|names)", refused(f"http://{host}/"))


def test_other_dots_are_read_as_dots_before_the_address_is_checked() -> None:
    assert "public internet" in refused("http://127。0。0。1/")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST"])
def test_names_of_this_machine_are_refused_by_what_the_system_resolves_them_to(host: str) -> None:
    with closing(Fetcher()) as one, pytest.raises(UnsafeUrlError, match="public internet"):
        one.get(f"http://{host}/")


@pytest.mark.parametrize(
    "url",
    [
        "http://user@images.test/",
        "http://user:word@images.test/",
        "http://:word@images.test/",
        "http://images.test:80@127.0.0.1/",
        "http://images.test\\@127.0.0.1/",
        "http://127.0.0.1:80\\@images.test/",
        "http://images.test%40127.0.0.1@10.0.0.1/",
        "http://images.test#@127.0.0.1:80@evil.test/",
    ],
)
def test_what_stands_before_an_at_sign_never_passes_for_the_host(url: str) -> None:
    assert refused(url)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://images.test/",
        "gopher://images.test/",
        "//images.test/",
        "images.test",
        "data:,x",
        "",
    ],
)
def test_only_http_and_https_are_spoken(url: str) -> None:
    assert refused(url) == "only http and https URLs"


def test_http_is_refused_where_only_https_will_do() -> None:
    assert refused("http://images.test/", https_only=True) == "only https URLs"


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_ports_that_are_none_are_refused(port: str) -> None:
    assert refused(f"http://images.test:{port}/") == "the URL's port is none"


def test_a_host_beside_the_list_is_refused_even_where_it_is_public() -> None:
    assert "--http-hosts" in refused("http://8.8.8.8/", hosts=("images.test",))
    assert "--http-hosts" in refused("http://images.test.evil.test/", hosts=("images.test",))


def test_hosts_are_compared_in_one_spelling(server: Server) -> None:
    for listed, host in (
        ("127.0.0.1", "127.0.0.1"),
        ("IMAGES.test.", "images.TEST"),
        ("images.test", "images.test."),
    ):
        names = Names(**NAMES) if host != "images.test." else Names(images_test_="127.0.0.1")
        with closing(Fetcher(FetchOptions(hosts=(listed,)), resolver=names)) as one:
            assert one.get(server.url(host=host)) == BODY


# Answers


def test_a_body_comes_as_it_was_sent_and_the_request_says_only_what_it_must(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:1")
    server.actions["/good"] = lambda handler: handler.answer(Set_Cookie="a=b")
    assert fetcher.get(server.url("/good?a=1&b=%20#part")) == BODY
    assert fetcher.get(server.url("/good")) == BODY
    assert [path for path, _ in server.requests] == ["/good?a=1&b=%20", "/good"]
    for _, headers in server.requests:
        assert headers == {
            "Host": f"images.test:{server.port}",
            "User-Agent": "hired (image captioning)",
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
        }


def test_a_name_is_resolved_once_a_connection_and_the_connection_is_kept(server: Server) -> None:
    names = Names(**NAMES)
    with closing(Fetcher(FetchOptions(hosts=("images.test",)), resolver=names)) as one:
        for _ in range(3):
            one.get(server.url())
    assert names.asked == ["images.test"]


def test_a_name_that_resolves_elsewhere_at_the_second_look_is_never_looked_up_twice(server: Server) -> None:
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    options = FetchOptions(hosts=("images.test",))
    with closing(Fetcher(options, resolver=lambda *_: next(answers))) as one:
        assert one.get(server.url()) == BODY


def test_the_next_address_of_a_host_is_tried_when_the_first_does_not_answer(server: Server) -> None:
    names = Names(images_test=["127.0.0.2", "127.0.0.1"])
    with closing(Fetcher(FetchOptions(hosts=("images.test",)), resolver=names)) as one:
        assert one.get(server.url()) == BODY


def test_a_refusal_names_its_status_and_repeats_nothing_of_the_server(
    server: Server, fetcher: Fetcher, waits: list[float]
) -> None:
    with pytest.raises(FetchError) as caught:
        fetcher.get(server.url("/gone"))
    assert str(caught.value) == "the server answered with status 404"
    assert isinstance(caught.value, HiredError)
    assert (caught.value.retryable, waits, len(server.requests)) == (False, [], 1)


def test_a_host_that_does_not_exist_is_tried_again_and_told_without_the_systems_words(
    waits: list[float],
) -> None:
    names = Names()
    with (
        closing(Fetcher(FetchOptions(attempts=3), resolver=names, sleep=waits.append)) as one,
        pytest.raises(FetchError, match=r"^the host cannot be reached$") as caught,
    ):
        one.get("http://secret.internal/")
    assert caught.value.retryable
    assert len(names.asked) == 3
    assert len(waits) == 2


def test_a_port_where_nobody_listens_is_told_without_its_address(fetcher: Fetcher) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(FetchError, match=r"^the host cannot be reached$"):
            fetcher.get(f"http://images.test:{port}/")


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(
    server: Server, fetcher: Fetcher, waits: list[float], status: int
) -> None:
    left = iter([status, status])
    server.actions["/busy"] = lambda handler: handler.answer(next(left, 200))
    assert fetcher.get(server.url("/busy")) == BODY
    assert len(waits) == 2
    assert 0 <= waits[0] <= 1
    assert 0 <= waits[1] <= 2


def test_a_server_that_stays_busy_is_given_up_for_another_time(server: Server, fetcher: Fetcher) -> None:
    server.actions["/busy"] = lambda handler: handler.answer(503)
    with pytest.raises(FetchError, match="status 503") as caught:
        fetcher.get(server.url("/busy"))
    assert caught.value.retryable
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("asked", "least_s", "most_s"),
    [
        ("7", 7, 7),
        ("99999", 30, 30),
        ("date", 15, 20),
        ("nonsense", 0, 1),
        ("-5", 0, 1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 1),
    ],
)
def test_a_server_that_says_when_to_come_back_is_obeyed_within_reason(
    server: Server, fetcher: Fetcher, waits: list[float], asked: str, least_s: float, most_s: float
) -> None:
    if asked == "date":
        asked = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    left = iter([429])
    server.actions["/busy"] = lambda handler: handler.answer(next(left, 200), Retry_After=asked)
    fetcher.get(server.url("/busy"))
    assert least_s <= waits[0] <= most_s


# Redirects


def test_redirects_are_followed_to_other_hosts_and_relative_places(server: Server, fetcher: Fetcher) -> None:
    places = iter([server.url("/b", "other.test"), "c?x=1", f"//images.test:{server.port}/good"])
    statuses = iter([301, 307, 303])
    for path in ("/a", "/b", "/c"):
        server.actions[path] = lambda handler: handler.answer(next(statuses), Location=next(places))
    assert fetcher.get(server.url("/a")) == BODY
    assert [path for path, _ in server.requests] == ["/a", "/b", "/c?x=1", "/good"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("http://10.0.0.1/", "--http-hosts"),
        ("http://169.254.169.254/latest/meta-data/", "--http-hosts"),
        ("http://2130706433/", "neither a name nor an address"),
        ("http://user:word@images.test/", "user name or password"),
        ("file:///etc/passwd", "only http and https"),
        ("http://[::1", "malformed"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(
    server: Server, fetcher: Fetcher, place: str, words: str
) -> None:
    server.actions["/trap"] = lambda handler: handler.answer(302, Location=place)
    with pytest.raises(UnsafeUrlError, match=words):
        fetcher.get(server.url("/trap"))


def test_a_redirect_to_a_private_address_is_refused_where_all_public_hosts_are_allowed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.actions["/trap"] = lambda handler: handler.answer(302, Location="http://inside.test/")
    monkeypatch.setattr(fetching, "is_public", lambda address: str(address) == "127.0.0.1")  # the server's
    names = Names(images_test="127.0.0.1", inside_test="10.0.0.1")
    with closing(Fetcher(resolver=names)) as one:
        assert one.get(server.url()) == BODY
        with pytest.raises(UnsafeUrlError, match="public internet"):
            one.get(server.url("/trap"))


def test_trust_in_a_name_can_end_at_private_addresses(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``public_only``: neither the name itself nor a redirect to another trusted name leads inside."""
    server.actions["/inside"] = lambda handler: handler.answer(302, Location=server.url(host="inside.test"))
    names = Names(images_test="127.0.0.1", inside_test=["127.0.0.9"])
    options = FetchOptions(hosts=("images.test", "inside.test"), public_only=True, attempts=1)
    with closing(Fetcher(options, resolver=names)) as one, pytest.raises(UnsafeUrlError):
        one.get(server.url())
    assert not server.requests

    # As if the server lay on the internet.
    monkeypatch.setattr(fetching, "is_public", lambda address: str(address) == "127.0.0.1")
    with closing(Fetcher(options, resolver=names)) as one:
        assert one.get(server.url()) == BODY
        with pytest.raises(UnsafeUrlError):
            one.get(server.url("/inside"))
    assert [path for path, _ in server.requests] == ["/good", "/inside"]


def test_redirects_in_a_circle_come_to_an_end(server: Server, fetcher: Fetcher) -> None:
    server.actions["/round"] = lambda handler: handler.answer(302, Location="/round")
    with pytest.raises(FetchError, match="more than 5 redirects") as caught:
        fetcher.get(server.url("/round"))
    assert not caught.value.retryable
    assert len(server.requests) == 6


def test_a_redirect_that_leads_nowhere_is_a_refusal(server: Server, fetcher: Fetcher) -> None:
    server.actions["/nowhere"] = lambda handler: handler.answer(302)
    with pytest.raises(FetchError, match="status 302"):
        fetcher.get(server.url("/nowhere"))


# Bodies


def test_a_body_that_announces_too_much_is_not_read(server: Server, fetcher: Fetcher) -> None:
    server.actions["/big"] = lambda handler: handler.answer(body=b"", Content_Length="100001")
    with pytest.raises(
        BodyTooLargeError, match="more than 100000 bytes; raise the limit by --max-file-bytes"
    ):
        fetcher.get(server.url("/big"))


def test_a_body_without_an_end_is_cut_off_at_the_limit(server: Server, fetcher: Fetcher) -> None:
    sent = [0]

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"2000\r\n" + bytes(0x2000) + b"\r\n")
            sent[0] += 0x2000

    server.actions["/endless"] = lambda handler: _until_broken(endless, handler)
    with pytest.raises(BodyTooLargeError):
        fetcher.get(server.url("/endless"))
    time.sleep(0.1)
    assert sent[0] < 50_000_000


def test_a_body_of_just_the_limit_is_taken(server: Server, fetcher: Fetcher) -> None:
    server.actions["/just"] = lambda handler: handler.answer(body=bytes(100_000))
    assert len(fetcher.get(server.url("/just"))) == 100_000


def test_a_body_that_is_shorter_than_announced_is_tried_again_and_never_taken_for_whole(
    server: Server, fetcher: Fetcher
) -> None:
    def short(handler: Handler) -> None:
        handler.answer(Content_Length=str(len(BODY) + 1))
        handler.close_connection = True

    server.actions["/short"] = short
    with pytest.raises(FetchError, match="broke before the answer was whole") as caught:
        fetcher.get(server.url("/short"))
    assert caught.value.retryable
    assert len(server.requests) == 3


def test_a_compressed_body_is_refused(server: Server, fetcher: Fetcher) -> None:
    server.actions["/zip"] = lambda handler: handler.answer(Content_Encoding="gzip")
    with pytest.raises(FetchError, match="compressed its answer"):
        fetcher.get(server.url("/zip"))


@pytest.mark.parametrize("what", ["head", "body", "nothing"])
def test_a_server_that_drips_is_left_when_the_time_is_over(server: Server, what: str) -> None:
    def drip(handler: Handler) -> None:
        if what == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(
                b"" if what == "nothing" else b"H" if what == "body" else b"HTTP/1.1 200 OK"[:1]
            )
            handler.wfile.flush()
            time.sleep(0.05)

    server.actions["/drip"] = lambda handler: _until_broken(drip, handler)
    options = FetchOptions(hosts=("images.test",), timeout_s=0.5)
    started_s = time.monotonic()
    with (
        closing(Fetcher(options, resolver=Names(**NAMES))) as one,
        pytest.raises(FetchError, match=r"not done after 0\.5 s") as caught,
    ):
        one.get(server.url("/drip"))
    assert caught.value.retryable
    assert time.monotonic() - started_s < 5


def test_a_resolver_that_hangs_is_left_when_the_time_is_over() -> None:
    release = threading.Event()

    def hangs(host: str, port: int) -> list[str]:
        release.wait(20)
        return []

    with closing(Fetcher(FetchOptions(timeout_s=0.3), resolver=hangs)) as one:
        with pytest.raises(FetchError, match=r"not done after 0\.3 s"):
            one.get("http://images.test/")
        release.set()


def test_threads_share_a_fetcher(server: Server, fetcher: Fetcher) -> None:
    bodies: list[bytes] = []
    threads = [threading.Thread(target=lambda: bodies.append(fetcher.get(server.url()))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert bodies == [BODY] * 24


def _until_broken(action: Callable[[Handler], None], handler: Handler) -> None:
    handler.close_connection = True
    try:
        action(handler)
    except OSError:
        return


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of ``images.test``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "images.test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


@pytest.fixture
def secure_server(certificate: tuple[Path, Path]) -> Iterator[Server]:
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield from running(server)


@pytest.fixture
def secure_fetcher(certificate: tuple[Path, Path], waits: list[float]) -> Iterator[Fetcher]:
    options = FetchOptions(hosts=("images.test", "other.test"), timeout_s=10)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with closing(Fetcher(options, resolver=Names(**NAMES), ssl_context=context, sleep=waits.append)) as one:
        yield one


def https(server: Server, path: str = "/good", host: str = "images.test") -> str:
    return server.url(path, host).replace("http:", "https:")


def test_the_certificate_is_checked_against_the_name_though_the_address_was_dialled(
    secure_server: Server, secure_fetcher: Fetcher, waits: list[float]
) -> None:
    assert secure_fetcher.get(https(secure_server)) == BODY
    with pytest.raises(FetchError, match="certificate does not prove") as caught:
        secure_fetcher.get(https(secure_server, host="other.test"))
    assert (caught.value.retryable, waits) == (False, [])


def test_a_certificate_that_nobody_vouches_for_is_refused(secure_server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(FetchError, match="certificate does not prove"):
        fetcher.get(https(secure_server))


def test_a_redirect_from_https_to_http_is_refused(
    secure_server: Server, secure_fetcher: Fetcher, server: Server
) -> None:
    secure_server.actions["/down"] = lambda handler: handler.answer(302, Location=server.url())
    with pytest.raises(UnsafeUrlError, match="from https to http"):
        secure_fetcher.get(https(secure_server, "/down"))
    assert not server.requests
