"""Who is let in, how much of a body is read, and that whoever is sent away is told at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from pipeline.serve.admission import Admission
from pipeline.serve.app import create_app
from pipeline.serve.keys import Keys
from pipeline.serve.settings import Limits, Settings
from tests.pipeline.serve.chats import PICTURE, asked
from tests.pipeline.serve.servers import FakeBackend, Servers

CHAT = "/v1/chat/completions"
KEY = "a-key-of-this-server"
OPEN = ("/health", "/", "/playground/playground.js")
CLOSED = (
    "/v1/models",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/playground/options",
    "/playground/",
    "//health",
)


@pytest.fixture
def fake() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    yield backend
    backend.release.set()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_health_and_the_page_wants_the_key(servers: Servers, fake: FakeBackend) -> None:
    url = servers.add(create_app(Settings(), fake, Keys.of([KEY])))
    assert [httpx.get(url + path).status_code for path in OPEN] == [200, 200, 200]
    for path in CLOSED:
        assert httpx.get(url + path).status_code == 401
    assert httpx.post(url + "/health").status_code == 401
    assert httpx.options(url + CHAT).status_code == 401

    refused = httpx.post(url + CHAT, json=asked(PICTURE), headers=bearer(KEY[:-1]))
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert not fake.queries
    assert httpx.post(url + CHAT, json=asked(PICTURE), headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "0.0.0.0"]
)
def test_without_keys_a_page_cannot_reach_this_machine_under_a_name_of_its_own(
    servers: Servers, fake: FakeBackend, host: str
) -> None:
    url = servers.add(create_app(Settings(), fake))
    assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == 403
    assert httpx.post(url + CHAT, json=asked(PICTURE), headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "127.0.0.2"]
)
def test_this_machines_own_names_are_let_in(servers: Servers, fake: FakeBackend, host: str) -> None:
    url = servers.add(create_app(Settings(), fake))
    assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == 200


def test_with_keys_or_for_everybody_any_host_will_do(servers: Servers, fake: FakeBackend) -> None:
    for app in (create_app(Settings(), fake, Keys.of([KEY])), create_app(Settings(without_keys=True), fake)):
        headers = {"Host": "captions.example"} | bearer(KEY)
        assert httpx.get(servers.add(app) + "/v1/models", headers=headers).status_code == 200


def test_a_body_is_counted_while_it_is_read(servers: Servers, fake: FakeBackend) -> None:
    url = servers.add(create_app(Settings(limits=Limits(body_bytes=10_000)), fake))
    headers = {"content-type": "application/json"}
    announced = httpx.post(url + CHAT, content=b" " * 10_001, headers=headers)
    assert (announced.status_code, announced.json()["error"]["code"]) == (413, "request_too_large")
    for path in (CHAT, "/playground/look"):
        unannounced = httpx.post(url + path, content=iter([b" " * 6_000] * 2), headers=headers)
        assert unannounced.status_code == 413
    assert httpx.post(url + CHAT, content=b" " * 10_000, headers=headers).status_code == 400


def test_a_body_without_an_end_is_left(servers: Servers, fake: FakeBackend) -> None:
    """The client goes on sending; the server has answered and listens no more."""
    url = httpx.URL(servers.add(create_app(Settings(limits=Limits(body_bytes=10_000)), fake)))
    assert url.port is not None
    with socket.create_connection(("127.0.0.1", url.port), timeout=30) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(20):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_drips_is_left_when_its_time_is_over(
    servers: Servers, fake: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.serve.gate.GRACE_S", 0.1)
    url = httpx.URL(servers.add(create_app(Settings(limits=Limits(request_s=0.2)), fake)))
    assert url.port is not None
    with socket.create_connection(("127.0.0.1", url.port), timeout=30) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            'Content-Length: 100\r\n\r\n{"model"'.encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 504")


def test_more_than_fit_are_sent_away_at_once_and_told_when_to_come_back(servers: Servers) -> None:
    fake = FakeBackend(hold_after=0)
    url = servers.add(create_app(Settings(limits=Limits(in_flight=3, retry_after_s=7)), fake))
    with ThreadPoolExecutor(3) as threads:
        inside = [threads.submit(httpx.post, url + CHAT, json=asked(PICTURE), timeout=60) for _ in range(3)]
        while fake.begun < 3:
            threading.Event().wait(0.01)
        for _ in range(5):
            refused = httpx.post(url + CHAT, json=asked(PICTURE))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
            assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.get(url + "/health").status_code == 200
        fake.release.set()
        assert [each.result().status_code for each in inside] == [200] * 3
    assert fake.begun == 3
    assert httpx.post(url + CHAT, json=asked(PICTURE)).status_code == 200


def test_a_closed_door_lets_those_inside_end(servers: Servers) -> None:
    fake, settings = FakeBackend(hold_after=1), Settings()
    admission = Admission(settings.limits.in_flight, settings.limits.retry_after_s)
    url = servers.add(create_app(settings, fake, admission=admission))
    with ThreadPoolExecutor(1) as threads:
        inside = threads.submit(httpx.post, url + CHAT, json=asked(PICTURE), timeout=60)
        while not fake.begun:
            threading.Event().wait(0.01)
        admission.close()
        assert admission.num_inside == 1
        assert httpx.post(url + CHAT, json=asked(PICTURE)).status_code == 503
        fake.release.set()
        assert inside.result().status_code == 200
    assert admission.num_inside == 0


def test_each_key_has_a_pace_of_its_own(servers: Servers, fake: FakeBackend) -> None:
    settings = Settings(limits=Limits(requests_per_minute=2))
    url = servers.add(create_app(settings, fake, Keys.of([KEY, KEY + "-of-another"])))

    def ask(key: str) -> httpx.Response:
        return httpx.post(url + CHAT, json=asked(PICTURE), headers=bearer(key))

    assert [ask(KEY).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(KEY)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert ask(KEY + "-of-another").status_code == 200
    assert httpx.get(url + "/v1/models", headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /%ff%00/../v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_odd_heads_are_no_failure_of_the_server(servers: Servers, fake: FakeBackend, head: bytes) -> None:
    url = httpx.URL(servers.add(create_app(Settings(), fake)))
    assert url.port is not None
    with socket.create_connection(("127.0.0.1", url.port), timeout=30) as connection:
        connection.sendall(head)
        answer: Any = connection.recv(2000)
    assert not answer.startswith(b"HTTP/1.1 5"), answer
    assert httpx.get(str(url) + "/health").status_code == 200
