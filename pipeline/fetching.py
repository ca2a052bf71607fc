"""http(s) URLs -> their bytes, from servers and through links that nobody vouches for.

FetchError                 the bytes did not come; ``retryable`` says whether they may another time
├── BodyTooLargeError      more bytes than the limit; the rest was not read
└── UnsafeUrlError         the URL, or one that it redirects to, must not be opened

A URL is parsed once. Its host is resolved once, every address is checked, and the connection goes to an
address that was checked (TLS still checks the name), so that no second look-up can give another one.
Redirects are followed by hand through the same checks. No proxies, cookies or credentials, neither from the
URL nor from the environment. What a server or a library says stays in the causes of the errors and out of
their messages.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeAlias

import httpcore
import httpx
import tenacity

from hired.errors import HiredError

CONNECT_TIMEOUT_S = 10.0
MAX_RESOLVING = 16
MAX_BACKOFF_S = 10.0  # full jitter, doubling from one second on
MAX_RETRY_AFTER_S = 30.0  # however long a server asks to wait

HEADERS = (
    ("User-Agent", "hired (image captioning)"),
    ("Accept", "image/*, */*;q=0.5"),
    ("Accept-Encoding", "identity"),  # a compressed body could be a bomb
)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*\.?")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")

# Until when the call of this thread may take; its connection may have been opened by another one.
_deadline_s: ContextVar[float] = ContextVar("_deadline_s")


class FetchError(HiredError):
    """The bytes behind a URL did not come."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.again_at_once = False  # worth another attempt within the same call
        self.retry_after_s = 0.0


class BodyTooLargeError(FetchError):
    """The body has more bytes than the limit."""


class UnsafeUrlError(FetchError):
    """The URL leads, or may lead, where nobody outside should be able to send this machine."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """What may be fetched, and how long and how often it is tried.

    ``hosts``, if there are any, are the only ones that are spoken to; they may lie on private addresses,
    unless ``public_only``.
    ``timeout_s`` is for one attempt with all its redirects.
    """

    hosts: tuple[str, ...] = ()
    https_only: bool = False
    public_only: bool = False
    timeout_s: float = 30.0
    max_bytes: int = 128 * 2**20
    max_redirects: int = 5
    attempts: int = 3


class Fetcher:
    """Fetches URLs; threads may share one, and connections are kept open for the next URL of a host."""

    def __init__(
        self,
        options: FetchOptions = FetchOptions(),
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._options = options
        self._hosts = frozenset(map(_plain, options.hosts))
        trusted = frozenset() if options.public_only else self._hosts
        self._backend = _CheckedBackend(trusted, resolver or resolved)
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            max_connections=None,  # the callers' threads bound them
            max_keepalive_connections=32,
            keepalive_expiry=15.0,
            network_backend=self._backend,
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, FetchError) and error.again_at_once
            ),
            stop=tenacity.stop_after_attempt(options.attempts),
            wait=_wait_s,
            sleep=sleep,
            reraise=True,
        )

    def get(self, url: str) -> bytes:
        """The body that ``url`` answers with; raises FetchError."""
        return self._retrying(self._attempt, url)

    def close(self) -> None:
        """Close the connections that are kept open."""
        self._pool.close()
        self._backend.close()

    def _attempt(self, url: str) -> bytes:
        token = _deadline_s.set(time.monotonic() + self._options.timeout_s)
        try:
            return self._followed(self._checked(url))
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise self._explained(error) from error
        finally:
            _deadline_s.reset(token)

    def _followed(self, url: httpx.URL) -> bytes:
        """The body at the end of the redirects."""
        for _ in range(self._options.max_redirects + 1):
            with self._pool.stream(
                "GET",
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=(("Host", url.netloc), *HEADERS),
                extensions={"timeout": {"connect": CONNECT_TIMEOUT_S, "read": None, "write": None}},
            ) as response:
                headers = httpx.Headers(response.headers)
                if response.status not in _REDIRECTS or "location" not in headers:
                    return self._body(response, headers)
            url = self._redirected(url, headers["location"])
        raise FetchError(f"more than {self._options.max_redirects} redirects")

    def _body(self, response: httpcore.Response, headers: httpx.Headers) -> bytes:
        if response.status != 200:
            raise _refusal(response.status, headers)
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError("the server compressed its answer though it was asked not to")
        limit = self._options.max_bytes
        announced, chunks, num_bytes = headers.get("content-length", ""), [], 0
        too_large = BodyTooLargeError(f"more than {limit} bytes; raise the limit by --max-file-bytes")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        for chunk in response.iter_stream():
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        try:
            target = self._checked(str(url.join(location)))
        except httpx.InvalidURL as error:
            raise UnsafeUrlError("it redirects to a malformed URL") from error
        if url.scheme == "https" and target.scheme != "https":
            raise UnsafeUrlError("it redirects from https to http")
        return target

    def _checked(self, text: str) -> httpx.URL:
        """The URL in its parts, if its spelling is one that may be opened."""
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise UnsafeUrlError("the URL is malformed") from error
        if url.scheme not in ("https",) if self._options.https_only else url.scheme not in _DEFAULT_PORTS:
            raise UnsafeUrlError(f"only {'https' if self._options.https_only else 'http and https'} URLs")
        if url.userinfo or "@" in url.netloc.decode("ascii"):
            raise UnsafeUrlError("the URL holds a user name or password; they are never sent")
        if url.port is not None and not 0 < url.port < 2**16:
            raise UnsafeUrlError("the URL's port is none")
        host = url.raw_host.decode("ascii")
        _check_spelling(host)
        if self._hosts and _plain(host) not in self._hosts:
            raise UnsafeUrlError("the host is not one of those in --http-hosts")
        return url

    def _explained(self, error: Exception) -> FetchError:
        """The same in our own words: a library's may hold addresses."""
        if isinstance(error.__context__, ssl.SSLCertVerificationError):  # the pool cuts off the cause
            return FetchError("the server's certificate does not prove that it is the host")
        if time.monotonic() >= _deadline_s.get():
            return FetchError(f"not done after {self._options.timeout_s:g} s", retryable=True)
        match error:
            case httpcore.ConnectError() | httpcore.ConnectTimeout():
                ours = FetchError("the host cannot be reached", retryable=True)
            case httpcore.LocalProtocolError() | httpcore.UnsupportedProtocol():
                return FetchError("the URL cannot be asked for")
            case _:
                ours = FetchError("the connection broke before the answer was whole", retryable=True)
        ours.again_at_once = True
        return ours


class _CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to addresses that were checked, whatever asks for them."""

    def __init__(self, hosts: frozenset[str], resolver: Resolver) -> None:
        self._hosts, self._resolver = hosts, resolver
        self._sockets = httpcore.SyncBackend()
        # The system's resolver knows no time limit of ours; whoever waits for it does.
        self._threads = ThreadPoolExecutor(MAX_RESOLVING, "resolving")

    def close(self) -> None:
        """Wait for no name any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first of the host's addresses that answers."""
        error: Exception = httpcore.ConnectError("no addresses")
        for address in self._addresses(host, port):
            try:
                limit_s = min(_remaining_s(), timeout or CONNECT_TIMEOUT_S)
                return _TimedStream(self._sockets.connect_tcp(str(address), port, timeout=limit_s))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failure:
                error = failure
        raise error

    def _addresses(self, host: str, port: int) -> list[Address]:
        try:
            addresses: list[Address] = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                found = self._threads.submit(self._resolver, host, port).result(_remaining_s())
                addresses = [ipaddress.ip_address(text) for text in found]
            except (OSError, UnicodeError, ValueError) as error:  # TimeoutError is an OSError
                raise httpcore.ConnectError("not resolved") from error
        named = _plain(host) in self._hosts
        if not all(is_public(address) or (named and is_private(address)) for address in addresses):
            raise UnsafeUrlError(
                "the host is not on the public internet; name it in --http-hosts to trust it"
            )
        return addresses


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every step ends with the call's time: bytes that drip cannot prolong it."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The bytes that come within the call's time."""
        return self._stream.read(max_bytes, _remaining_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send within the call's time."""
        self._stream.write(buffer, _remaining_s())

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same connection, encrypted, with the host's name proved."""
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, _remaining_s()))

    def get_extra_info(self, info: str) -> object:
        """What the socket knows."""
        return self._stream.get_extra_info(info)


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name, by the system's own resolver; raises OSError."""
    # Only the addresses count: a name that looks like a number never gets here.
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


# IPv6 that any address of the internet lies in, and IPv6 that leads to an IPv4 address through a translator.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What some versions of Python's ipaddress hold for global and is not: protocol assignments, the relays of
# 6to4, documentation, and the tunnels themselves (Teredo) where the far end is anybody's.
_NOT_GLOBAL: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20"))
)
# Where clouds answer whoever asks with the machine's own keys, beside the link-local 169.254.169.254.
_METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254", "fd20:ce::254")))


def is_public(address: Address) -> bool:
    """Whether the address, and the IPv4 address that it may stand for, belongs to the public internet."""
    inner = _embedded(address)
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address in _NAT64):
        return inner is not None and is_public(inner)
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    if inner is not None and not is_public(inner):
        return False
    known = any(address in network for network in _NOT_GLOBAL if network.version == address.version)
    return address.is_global and not (address.is_multicast or address.is_reserved or known)


def is_private(address: Address) -> bool:
    """Whether a host that is trusted by name may lie there: private networks and this machine itself.

    Never where clouds hand out a machine's own keys, nor what is no machine's address.
    """
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return is_private(address.ipv4_mapped)
    if address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return any(address in network for network in _TRUSTABLE if network.version == address.version)


_TRUSTABLE: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "::1", "fc00::/7"),
    )
)


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one may stand for: mapped, NAT64, 6to4, ISATAP."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    is_isatap = (int(address) >> 32) & 0xFDFFFFFF == 0x5EFE
    return address.ipv4_mapped or address.sixtofour or (low if address in _NAT64 or is_isatap else None)


def _check_spelling(host: str) -> None:
    """Refuses what resolvers read as an address though it does not look like one: 2130706433, 0x7f.1."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        last_label = host.rstrip(".").rpartition(".")[2]
        if not _NAME.fullmatch(host) or _NUMBER.fullmatch(last_label) or len(host) > 253:
            raise UnsafeUrlError("the URL's host is neither a name nor an address as it is written") from None
    if "%" in host:
        raise UnsafeUrlError("the URL's host names a network interface")


def _plain(host: str) -> str:
    """One spelling of a host, for comparing."""
    host = host.strip().lower().strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _refusal(status: int, headers: httpx.Headers) -> FetchError:
    """For an answer without the bytes."""
    transient = status in _TRANSIENT or status >= 500
    error = FetchError(f"the server answered with status {status}", retryable=transient)
    error.again_at_once, error.retry_after_s = transient, _seconds(headers.get("retry-after", ""))
    return error


def _seconds(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for, as a number or as a date; 0 for nonsense."""
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:9])
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Exponential backoff with full jitter, and no less than the server asked for, up to a limit."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.retry_after_s if isinstance(error, FetchError) else 0.0
    backoff_s = random.uniform(0, min(MAX_BACKOFF_S, 2.0 ** (state.attempt_number - 1)))
    return max(min(asked_s, MAX_RETRY_AFTER_S), backoff_s)


def _remaining_s() -> float:
    """What is left of the time of the call; raises when nothing is."""
    remaining_s = _deadline_s.get() - time.monotonic()
    if remaining_s <= 0:
        raise httpcore.ReadTimeout("the call's time is over")
    return remaining_s
