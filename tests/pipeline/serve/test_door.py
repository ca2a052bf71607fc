"""The door in the proxy: who is too many learns it there, and the application is told how many they were."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from hired.errors import ConfigurationError
from pipeline.serve import door
from pipeline.serve.app import create_app
from pipeline.serve.door import Door
from pipeline.serve.settings import Settings
from tests.pipeline.serve.chats import PICTURE, asked
from tests.pipeline.serve.servers import FakeBackend, Servers

CHAT = "/v1/chat/completions"


def told(url: str, name: str) -> dict[str, float]:
    lines = [line for line in httpx.get(url + "/metrics").text.splitlines() if line.startswith(name + "{")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_who_is_too_many_is_sent_away_and_counted_by_the_application(servers: Servers) -> None:
    fake = FakeBackend(hold_after=0)
    url = servers.add(Door(create_app(Settings(), fake), in_flight=2, retry_after_s=7))
    with ThreadPoolExecutor(2) as threads:
        inside = [threads.submit(httpx.post, url + CHAT, json=asked(PICTURE), timeout=60) for _ in range(2)]
        while fake.begun < 2:
            threading.Event().wait(0.01)
        for _ in range(5):
            refused = httpx.post(url + CHAT, json=asked(PICTURE), headers={"x-request-id": "mine"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
            assert refused.json()["error"]["code"] == "overloaded"
            assert refused.headers["x-request-id"] == "mine"
        assert httpx.get(url + "/health").status_code == 200
        fake.release.set()
        assert [each.result().status_code for each in inside] == [200] * 2
    assert fake.begun == 2
    assert httpx.post(url + CHAT, json=asked(PICTURE)).status_code == 200
    assert told(url, "hired_requests_total")['hired_requests_total{route="other",status="503"}'] == 5
    assert told(url, "hired_request_failures_total") == {'hired_request_failures_total{code="overloaded"}': 5}


def test_a_client_cannot_tell_of_others_that_were_turned_away(servers: Servers) -> None:
    url = servers.add(create_app(Settings(), FakeBackend()))
    assert httpx.post(url + CHAT, json=asked(PICTURE), headers={door.TURNED_AWAY: "9"}).status_code == 200
    assert not told(url, "hired_request_failures_total")


def test_whoever_fails_inside_makes_room(servers: Servers) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("the proxy failed")

    url = servers.add(Door(broken, in_flight=1, retry_after_s=1))
    assert [httpx.post(url).status_code for _ in range(3)] == [500] * 3


def test_the_environment_describes_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in door.environment(5, 2.0).items():
        monkeypatch.setenv(name, value)
    [made] = door.middlewares()
    assert (made.cls, made.kwargs) == (Door, {"in_flight": 5, "retry_after_s": 2.0})
    path = os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    assert path == "pipeline.serve.door.middlewares"
    monkeypatch.delenv(door.IN_FLIGHT)
    with pytest.raises(ConfigurationError, match=door.IN_FLIGHT):
        door.middlewares()


def test_a_proxy_need_not_load_the_models_libraries() -> None:
    code = "import sys, pipeline.serve.door; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
