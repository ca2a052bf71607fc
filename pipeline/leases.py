"""A lock in S3: an object that its holder writes anew again and again, and that others take over when old.

Conditional writes (If-None-Match, If-Match) let one of several contenders win. Age is told by the store's
own clock. A holder on this machine whose process is gone is followed at once, so that a job that was killed
can be started again without waiting.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.s3 import StorageOptions

log = logging.getLogger(__name__)

LEASE_S = 120.0
HEARTBEAT_S = 20.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: ``host`` tells machines and containers apart, ``token`` the attempts to hold it."""

    owner: str
    host: str
    process: int
    token: str

    @classmethod
    def this_process(cls, owner: str) -> Holder:
        return cls(owner, _host(), os.getpid(), uuid.uuid4().hex)

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls("somebody unknown", "", 0, "")

    def is_gone(self) -> bool:
        """Whether it surely is: it ran here, and runs no more."""
        return self.host == _host() and not os.path.exists(f"/proc/{self.process}")

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def _host() -> str:
    """The machine since its start, and the container: process numbers mean the same within it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()}/{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Lease:
    """Held while in the context; raises ConfigurationError that names the owner who holds it.

    When it cannot be kept, since another took it over or the store was out of reach for too long, ``on_loss``
    is called, which by default asks this process to end by SIGTERM.
    """

    def __init__(
        self,
        uri: str,
        owner: str,
        options: StorageOptions,
        *,
        lease_s: float = LEASE_S,
        heartbeat_s: float = HEARTBEAT_S,
        on_loss: Callable[[], None] = _stop,
    ) -> None:
        self._uri, self._options = uri, options
        self._holder = Holder.this_process(owner)
        self._lease_s, self._heartbeat_s, self._on_loss = lease_s, heartbeat_s, on_loss
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._etag = self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # an old lease is as good as none
            if self._is_mine():
                s3.delete(self._uri, [s3.split(self._uri)[1]], self._options)

    def _take(self) -> str:
        try:
            return self._put(IfNoneMatch="*")
        except FileExistsError:
            pass
        try:
            found = s3.get_versioned(self._uri, self._options)
        except FileNotFoundError:  # its holder has just ended
            return self._take()
        other = Holder.parse(found.data)
        if other.token == self._holder.token:  # the first try arrived, its answer did not
            return found.etag
        if found.age_s <= self._lease_s and not other.is_gone():
            raise self._held(other, found.age_s)
        log.warning("taking over %s from %s", self._uri, other.owner)
        try:
            return self._put(IfMatch=found.etag)
        except (FileExistsError, FileNotFoundError) as error:
            if self._is_mine():
                return s3.get_versioned(self._uri, self._options).etag
            raise self._held(other, 0.0) from error

    def _held(self, other: Holder, age_s: float) -> ConfigurationError:
        return ConfigurationError(
            f"{self._uri} is held by {other.owner}, heard of {age_s:.0f} s ago; wait for its end, or end it. "
            f"It is taken over when nothing was heard for {self._lease_s:.0f} s"
        )

    def _put(self, **condition: str) -> str:
        return s3.put(self._uri, self._holder.dump(), self._options, **condition)

    def _is_mine(self) -> bool:
        try:
            return Holder.parse(s3.get_versioned(self._uri, self._options).data).token == self._holder.token
        except FileNotFoundError:
            return False

    def _keep(self) -> None:
        renewed_s = time.monotonic()
        while not self._released.wait(self._heartbeat_s):
            started_s = time.monotonic()
            try:
                if not self._renew():
                    break
                renewed_s = started_s
            except OSError as error:
                log.warning("%s cannot be renewed: %s", self._uri, error)
                if time.monotonic() - renewed_s >= self._lease_s:
                    break
        else:
            return
        log.error("%s was lost to another process; this one stops", self._uri)
        self._on_loss()

    def _renew(self) -> bool:
        """Whether it is still held."""
        try:
            self._etag = self._put(IfMatch=self._etag)
        except (FileExistsError, FileNotFoundError):
            if not self._is_mine():
                return False
            self._etag = s3.get_versioned(self._uri, self._options).etag
        return True
