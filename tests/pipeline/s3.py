"""S3 on this machine: moto's server on a free port, and a layer before it that answers badly now and then.

    s3 = S3Server.start()            # the environment it needs is in s3.environment
    bucket = s3.make_bucket()        # "s3://test-0"
    with s3.faults(rate=0.2, seed=7):
        ...                          # every fifth request fails
    s3.stop()

Which requests fail is drawn by the seed, in the order of their arrival. The same request never fails more
than ``Faults.in_a_row`` times in a row, so that whoever tries often enough gets through.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any, Literal

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, make_server

from pipeline.storage import StorageOptions

Kind = Literal["slow-down", "internal-error", "reset", "cut"]
KINDS: tuple[Kind, ...] = ("slow-down", "internal-error", "reset", "cut")
ANSWERS = {
    "slow-down": ("503 Slow Down", "SlowDown"),
    "internal-error": ("500 Internal Server Error", "InternalError"),
}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
StartResponse = Callable[..., Any]
# Of this process, as moto's buckets are: two servers must not share one.
_numbers = count()


@dataclass
class Faults:
    """Which requests fail, how, and how many did, by kind."""

    rate: float = 0.0
    seed: int = 0
    kinds: tuple[Kind, ...] = KINDS
    in_a_row: int = 2
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._in_a_row: Counter[str] = Counter()
        self._lock = threading.Lock()

    def draw(self, request: str) -> Kind | None:
        with self._lock:
            if self._random.random() >= self.rate or self._in_a_row[request] >= self.in_a_row:
                self._in_a_row[request] = 0
                return None
            kind = self._random.choice(self.kinds)
            self._in_a_row[request] += 1
            self.seen[kind] += 1
            return kind


class _FaultyApplication:
    """A WSGI application before another one."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.faults = Faults()
        self.num_requests = 0

    def __call__(self, environ: Mapping[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        self.num_requests += 1
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        kind = self.faults.draw(request + environ.get("HTTP_RANGE", ""))
        if kind is None:
            return self._answered(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if kind == "cut" and environ["REQUEST_METHOD"] == "GET":
            return self._cut(environ, start_response)
        if kind in ANSWERS:
            status, code = ANSWERS[kind]
            start_response(status, [("Content-Type", "application/xml"), ("Connection", "close")])
            return [f"<Error><Code>{code}</Code><Message>as drawn</Message></Error>".encode()]
        _reset(environ["werkzeug.socket"])
        raise ConnectionResetError

    def _answered(self, environ: Mapping[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer

    def _cut(self, environ: Mapping[str, Any], start_response: StartResponse) -> Iterator[bytes]:
        """Half of the body that was announced."""
        body = b"".join(self._answered(environ, start_response))
        yield body[: len(body) // 2]
        _reset(environ["werkzeug.socket"])
        raise ConnectionResetError


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


class _QuietHandler(MotoRequestHandler):
    def log(self, *arguments: Any) -> None:
        """Nothing."""


class S3Server:
    """A server of this process, with its buckets in memory."""

    def __init__(self, application: _FaultyApplication, server: BaseWSGIServer) -> None:
        self._application, self._server = application, server
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}
        threading.Thread(target=server.serve_forever, daemon=True).start()

    @classmethod
    def start(cls) -> S3Server:
        application = _FaultyApplication(DomainDispatcherApplication(create_backend_app))
        server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_QuietHandler)
        return cls(application, server)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(s3_endpoint=self.endpoint)

    @property
    def num_requests(self) -> int:
        return self._application.num_requests

    @property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def make_bucket(self) -> str:
        """The URI of a new, empty bucket."""
        name = f"test-{next(_numbers)}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def fill(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Put many objects at once, without the way through HTTP."""
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for key, data in objects.items():
            backend.put_object(bucket.removeprefix("s3://"), key, data)

    def objects(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """What lies below a prefix, told without the way through HTTP."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket.removeprefix("s3://")].keys
        return {key: bytes(found.value) for key, found in sorted(keys.items()) if key.startswith(prefix)}

    def modified(self, uri: str) -> datetime:
        """When an object was written last, told without the way through HTTP."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        found = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].get_object(bucket, key)
        assert found is not None
        moment: datetime = found.last_modified
        return moment

    @contextmanager
    def faults(self, rate: float, seed: int = 0, kinds: tuple[Kind, ...] = KINDS) -> Iterator[Faults]:
        """Within, requests fail at this rate; what is given back counts them."""
        self._application.faults = faults = Faults(rate, seed, kinds)
        try:
            yield faults
        finally:
            self._application.faults = Faults()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A server, and the environment to reach it; import this fixture where it is used."""
    server = S3Server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.stop()
