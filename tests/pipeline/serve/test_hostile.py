"""Files that broke decoders, and requests that nobody would write: an answer each, and the server lives."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from pipeline.serve.app import create_app
from pipeline.serve.settings import Settings
from tests.pipeline.serve.chats import SCENES, asked
from tests.pipeline.serve.servers import FakeBackend, Servers

CHAT = "/v1/chat/completions"
EXAMPLES = 50


def test_the_hostile_corpus_gets_an_answer_each(endpoint: httpx.Client, corpus: Path) -> None:
    files = sorted(path for path in (corpus / "hostile").rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        answer = endpoint.post(CHAT, json=asked(path, max_tokens=1))
        assert answer.status_code in (200, 400, 413), (path.name, answer.text)
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"] == "messages[0].content[1].image_url", path.name
            assert error["code"] in ("invalid_image", "image_too_large", "image_timeout"), path.name
    assert endpoint.get("/health").status_code == 200
    good = endpoint.post(CHAT, json=asked(SCENES / "scene-001.jpg", max_tokens=4))
    assert good.json()["choices"][0]["message"]["content"]


@pytest.mark.filterwarnings("ignore")
def test_no_request_that_the_description_allows_or_forbids_is_a_failure_of_the_server(
    servers: Servers,
) -> None:
    url = servers.add(create_app(Settings(), FakeBackend()))
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {CHAT, "/v1/models", "/health", "/metrics"}
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    statuses = set()
    for operation in operations:
        for mode in modes:
            if mode.is_negative and not operation.body:
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES if operation.body else 5,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                deadline=None,
            )
            def ask(case: schemathesis.Case) -> None:
                answer = case.call()
                statuses.add(answer.status_code)
                case.validate_response(answer, checks=[not_a_server_error])

            ask()
    assert {200, 400} <= statuses
    assert httpx.get(f"{url}/health").status_code == 200


@given(body=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_bodies_of_anything_are_refused(fuzzed: httpx.Client, body: bytes) -> None:
    answer = fuzzed.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def fuzzed(servers: Servers) -> httpx.Client:
    return httpx.Client(base_url=servers.add(create_app(Settings(), FakeBackend())), timeout=30)
