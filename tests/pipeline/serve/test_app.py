"""The API over HTTP: the embedded model's answers are the batch job's, everything else is told by a fake."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from hired.errors import CapacityError, EngineDeadError, GenerationError, PromptError
from hired.prompts import Message
from pipeline import metrics
from pipeline.columns import of_images
from pipeline.config import Config
from pipeline.questions import Question, to_json
from pipeline.serve.app import create_app
from pipeline.serve.settings import Limits, Settings
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage
from tests.pipeline.serve.chats import PICTURE, SCENES, asked, data_uri, events, image_part, text_of
from tests.pipeline.serve.conftest import SETTINGS
from tests.pipeline.serve.servers import FakeBackend, Servers

CHAT = "/v1/chat/completions"
PICTURES = sorted(SCENES.glob("scene-00*"))[:6]
FULL, KEPT = 8, 2  # of the fake's pictures


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(servers: Servers, fake: FakeBackend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=servers.add(create_app(Settings(), fake)), timeout=30) as one:
        yield one


# The same as the batch job


def captions_of_the_job(prompt: str, token_budget: float | int, max_new_tokens: int) -> list[str]:
    """What the job's stages write, in batches, in its own words for it all."""
    config = Config(
        input="-",
        output="-",
        device="cpu",
        dtype="float32",
        token_budget=token_budget,
        isolated_decoding=False,
    )
    question = Question(0, "q", prompt, max_new_tokens, 0.0, 1.0, 0, ())
    batch: Any = of_images([path.read_bytes() for path in PICTURES]) | {
        "index": np.arange(len(PICTURES)),
        "key": np.array([path.name for path in PICTURES], dtype=object),
        "path": np.array([str(path) for path in PICTURES], dtype=object),
        "questions": np.array([to_json([question])] * len(PICTURES), dtype=object),
        "is_sample": np.zeros(len(PICTURES), bool),
    }
    for stage in (PartitionStage(config), EncodeStage(config), GenerateStage(config)):
        batch = stage(batch)
    assert isinstance(batch["caption"], np.ndarray | pa.Array)
    return [str(caption) for caption in batch["caption"]]


@pytest.mark.parametrize(
    ("token_budget", "options"),
    [
        (0.2, {}),
        (0.5, {"detail": "high"}),
        (64, {"hired": {"token_budget": 64, "policy": "hired", "alpha": 0.5}}),
    ],
)
def test_answers_are_the_batch_jobs(
    endpoint: httpx.Client, token_budget: float | int, options: dict[str, Any]
) -> None:
    detail = options.pop("detail", None)
    prompt = "Describe the image."
    expected = captions_of_the_job(prompt, token_budget, 20)
    assert len(set(expected)) > 3
    for path, caption in zip(PICTURES, expected, strict=True):
        body = asked(prompt=prompt, max_tokens=20, **options)
        body["messages"][0]["content"].append(image_part(path, detail))
        answer = endpoint.post(CHAT, json=body).json()
        assert answer["choices"][0]["message"]["content"] == caption, path


def test_a_stream_joins_to_the_whole_answer_and_tells_its_usage(endpoint: httpx.Client) -> None:
    whole = endpoint.post(CHAT, json=asked(PICTURES[1])).json()
    body = asked(PICTURES[1], stream=True, stream_options={"include_usage": True})
    streamed = endpoint.post(CHAT, json=body)
    *chunks, with_usage, done = events(streamed.text)

    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert done is None
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert len(chunks) > 10
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert with_usage["choices"] == []
    assert with_usage["usage"] == whole["usage"]
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["visual_tokens_kept"] < usage["visual_tokens_full"]


def test_stop_strings_end_both_kinds_of_answers_alike(endpoint: httpx.Client) -> None:
    body = asked(PICTURES[1], stop=[" sign", "zebra"])
    text = endpoint.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert text
    assert " sign" not in text
    assert text_of(events(endpoint.post(CHAT, json=body | {"stream": True}).text)) == text


def test_draws_follow_the_seed(endpoint: httpx.Client) -> None:
    def drawn(seed: int) -> str:
        body = asked(PICTURES[1], temperature=1.5, top_p=0.9, seed=seed, max_tokens=8)
        return str(endpoint.post(CHAT, json=body).json()["choices"][0]["message"]["content"])

    assert drawn(-5) == drawn(-5)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_several_images_and_earlier_answers_are_seen_together(endpoint: httpx.Client) -> None:
    one = endpoint.post(CHAT, json=asked(PICTURES[0])).json()["usage"]
    other = endpoint.post(CHAT, json=asked(PICTURES[1])).json()["usage"]
    both = endpoint.post(CHAT, json=asked(PICTURES[0], PICTURES[1])).json()["usage"]
    for kind in ("visual_tokens_full", "visual_tokens_kept"):
        assert both[kind] == one[kind] + other[kind]

    [question] = asked(PICTURES[0])["messages"]
    history = [question, {"role": "assistant", "content": "a red ring."}, question]
    spoken = endpoint.post(CHAT, json=asked() | {"messages": history}).json()["usage"]
    assert spoken["visual_tokens_kept"] == 2 * one["visual_tokens_kept"]
    assert spoken["prompt_tokens"] > 2 * one["prompt_tokens"]


def test_a_conversation_without_images_is_answered(endpoint: httpx.Client) -> None:
    answer = endpoint.post(CHAT, json=asked(prompt="Hello?", max_tokens=4))
    assert answer.status_code == 200
    assert answer.json()["usage"]["visual_tokens_full"] == 0


def test_a_prompt_that_does_not_fit_the_context_is_the_clients_error(endpoint: httpx.Client) -> None:
    error = endpoint.post(CHAT, json=asked(PICTURES[0], prompt="a b c " * 4000)).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_every_policy_that_may_be_named_keeps_something_or_is_refused_by_name(endpoint: httpx.Client) -> None:
    statuses = {}
    for policy in SETTINGS.allowed_policies:
        body = asked(PICTURES[1], max_tokens=1, hired={"policy": policy})
        answer = endpoint.post(CHAT, json=body)
        statuses[policy] = answer.status_code
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] == "hired.policy"
    assert set(statuses.values()) <= {200, 400}, statuses
    assert statuses["hired"] == statuses["keep-all"] == 200


def test_image_tokens_cannot_be_smuggled_in(endpoint: httpx.Client) -> None:
    answer = endpoint.post(CHAT, json=asked(PICTURES[0], prompt="Look: <image>"))
    assert answer.status_code == 400
    assert "<image>" in answer.json()["error"]["message"]


# What is asked of the stages


def test_detail_and_the_extension_choose_budgets_image_by_image(
    client: httpx.Client, fake: FakeBackend
) -> None:
    content = [image_part(PICTURE, detail) for detail in ("low", "high", "auto", None)]
    body = asked() | {"messages": [{"role": "user", "content": content}]}
    assert client.post(CHAT, json=body).status_code == 200
    assert [budget.rate for budget, _ in fake.kept] == [0.05, 0.5, 0.2, 0.2]
    assert {policy for _, policy in fake.kept} == {"hired"}

    fake.kept.clear()
    own = {"token_budget": 7, "policy": "keep-all", "alpha": 0.25}
    assert client.post(CHAT, json=body | {"hired": own}).status_code == 200
    assert {(budget.tokens, budget.alpha, policy) for budget, policy in fake.kept} == {(7, 0.25, "keep-all")}


def test_the_conversation_reaches_the_model_as_it_was_said(client: httpx.Client, fake: FakeBackend) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "See"}, image_part(PICTURE)]},
    ]
    client.post(CHAT, json=asked(max_tokens=9, stop="x", seed=3, temperature=0.5) | {"messages": messages})
    [query] = fake.queries
    assert query.conversation == (Message("system", ("Be brief.",)), Message("user", ("See", None)))
    assert (query.max_new_tokens, query.stop) == (9, ("x",))
    assert (query.sampling.temperature, query.sampling.seed) == (0.5, 3)


def test_without_a_temperature_answers_are_greedy_as_in_the_job(
    client: httpx.Client, fake: FakeBackend
) -> None:
    client.post(CHAT, json=asked(PICTURE))
    assert fake.queries[0].sampling.is_greedy


# Errors


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "gpt"}, 404, "model", "model_not_found"),
        ({"max_tokens": 2000}, 400, "max_completion_tokens", "invalid_value"),
        ({"hired": {"policy": "nothing"}}, 400, "hired.policy", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages[0]", "invalid_value"),
        (asked(*[PICTURE] * 9), 400, "messages[0].content[9].image_url", "too_many_images"),
        (asked(PICTURE, b"no image"), 400, "messages[0].content[2].image_url", "invalid_image"),
        (
            asked(PICTURE, "data:image/png;base64,%%"),
            400,
            "messages[0].content[2].image_url",
            "invalid_image",
        ),
        (asked("https://127.0.0.1/a.png"), 400, "messages[0].content[1].image_url", "unsafe_url"),
        (asked("file:///etc/passwd"), 400, "messages[0].content[1].image_url", "unsafe_url"),
        (asked(prompt="a" * 40_000), 400, "messages", "invalid_value"),
    ],
)
def test_a_wrong_request_names_where_it_is_wrong(
    client: httpx.Client, fake: FakeBackend, changes: dict[str, Any], status: int, param: str, code: str
) -> None:
    for stream in (False, True):
        answer = client.post(CHAT, json=asked(PICTURE) | changes | {"stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    assert not fake.queries


def test_the_servers_own_limit_of_the_budget_holds(servers: Servers, fake: FakeBackend) -> None:
    settings = Settings(token_budget=0.1, low_token_budget=0.05, high_token_budget=0.3, max_token_budget=0.3)
    url = servers.add(create_app(settings, fake))
    own = [httpx.post(url + CHAT, json=asked(PICTURE, hired={"token_budget": b})) for b in (0.3, 0.31, 99)]
    assert [answer.status_code for answer in own] == [200, 400, 400]
    assert own[1].json()["error"]["param"] == "hired.token_budget"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (CapacityError("the prompt does not fit"), 400, "context_length_exceeded"),
        (PromptError("the template refuses it"), 400, "invalid_value"),
        (GenerationError("scores are not numbers at 0x7f3a"), 500, "model_error"),
        (EngineDeadError("CUDA error at /root/model"), 503, "unavailable"),
        (RuntimeError("secret/path and 0x7f3a"), 500, None),
    ],
)
def test_what_goes_wrong_inside_has_a_status_and_keeps_its_words(
    servers: Servers, error: Exception, status: int, code: str | None
) -> None:
    fake = FakeBackend(words=())
    fake.error = error
    url = servers.add(create_app(Settings(), fake))
    for stream in (False, True):  # nothing has been told yet: there is still a status to give
        answer = httpx.post(url + CHAT, json=asked(PICTURE, stream=stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert not {"0x7f3a", "/root/model", "secret/path"} & set(answer.text.split())
        assert ("retry-after" in answer.headers) == (status == 503)


def test_a_stream_that_breaks_ends_with_an_error(client: httpx.Client, fake: FakeBackend) -> None:
    fake.error = EngineDeadError("the engine failed")
    *chunks, error, done = events(client.post(CHAT, json=asked(PICTURE, stream=True)).text)
    assert text_of(chunks) == "a red fox"
    assert error["error"]["code"] == "unavailable"
    assert done is None


def test_other_routes_methods_and_media_types_fail_in_the_same_shape(client: httpx.Client) -> None:
    answers = [
        client.get("/v1/nothing"),
        client.get(CHAT),
        client.delete("/v1/models"),
        client.post(CHAT, content="{}", headers={"content-type": "text/plain"}),
        client.post(CHAT, content="{", headers={"content-type": "application/json"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 405, 415, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# The other routes


def test_models_health_and_openapi(client: httpx.Client, fake: FakeBackend) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("embedded", "model")
    assert client.get("/v1/models/embedded").json() == model
    assert client.get("/v1/models/other").status_code == 404
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, "/v1/models", "/health", "/metrics"} <= set(paths)
    assert client.get("/health").json() == {"status": "ok"}


def test_health_fails_when_a_stage_does(servers: Servers, fake: FakeBackend) -> None:
    fake.illness = EngineDeadError("dead at 0x7f3a")
    answer = httpx.get(servers.add(create_app(Settings(), fake)) + "/health")
    assert answer.status_code == 503
    assert "0x7f3a" not in answer.text


def test_metrics_count_what_was_asked_answered_and_refused(client: httpx.Client, fake: FakeBackend) -> None:
    client.post(CHAT, json=asked(PICTURE, PICTURE))
    client.post(CHAT, json=asked(PICTURE, stream=True))
    client.post(CHAT, json=asked(b"no image"))
    client.get("/v1/nothing")
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    assert lines[f'hired_requests_total{{route="{CHAT}",status="200"}}'] == "2.0"
    assert lines[f'hired_requests_total{{route="{CHAT}",status="400"}}'] == "1.0"
    assert lines['hired_requests_total{route="other",status="404"}'] == "1.0"
    assert lines['hired_request_failures_total{code="invalid_image"}'] == "1.0"
    assert lines[f'hired_requests_in_flight{{worker="{metrics.worker()}"}}'] == "1.0"
    assert lines["hired_time_to_first_token_seconds_count"] == "1.0"
    assert lines["hired_time_per_output_token_seconds_count"] == "1.0"
    assert lines['hired_visual_tokens_total{kind="full"}'] == str(2.0 * FULL)
    assert lines['hired_visual_tokens_total{kind="kept"}'] == str(2.0 * KEPT)
    assert lines["hired_output_tokens_total"] == str(2.0 * len(fake.words))
    assert lines['hired_kv_cache_tokens{state="held",worker="fake"}'] == "4.0"


# Time, and clients that go


def test_an_answer_that_takes_too_long_is_ended(servers: Servers) -> None:
    fake = FakeBackend(hold_after=0)
    settings = Settings(limits=Limits(request_s=0.2))
    url = servers.add(create_app(settings, fake))
    for stream in (False, True):
        answer = httpx.post(url + CHAT, json=asked(PICTURE, stream=stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert fake.given_up == 2


def test_a_stream_that_takes_too_long_ends_with_an_error(servers: Servers) -> None:
    fake = FakeBackend(hold_after=1)
    url = servers.add(create_app(Settings(limits=Limits(request_s=0.2)), fake))
    *chunks, error, done = events(httpx.post(url + CHAT, json=asked(PICTURE, stream=True)).text)
    assert text_of(chunks) == "a"
    assert error["error"]["code"] == "timeout"
    assert done is None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(servers: Servers, stream: bool) -> None:
    fake = FakeBackend(hold_after=1)
    url = servers.add(create_app(Settings(), fake))
    with httpx.Client(timeout=httpx.Timeout(30, read=0.3)) as client, pytest.raises(httpx.ReadTimeout):
        client.post(url + CHAT, json=asked(PICTURE, stream=stream))
    until(lambda: fake.given_up == 1)
    assert fake.begun == 1


def until(is_so: Any, tries: int = 500) -> None:
    import time

    for _ in range(tries):
        if is_so():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to pass")


def test_nothing_of_an_image_is_logged(
    client: httpx.Client, fake: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = data_uri(b"no image but a secret" * 9)
    fake.error = RuntimeError("broken")
    assert client.post(CHAT, json=asked(PICTURE)).status_code == 500
    assert client.post(CHAT, json=asked(secret)).status_code == 400
    assert caplog.records
    assert secret[40:60] not in caplog.text
    assert "a secret" not in caplog.text


def test_pages_of_other_hosts_may_call_only_where_the_settings_name_them(
    servers: Servers, fake: FakeBackend
) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = httpx.options(servers.add(create_app(Settings(), fake)) + CHAT, headers=asks)
    assert "access-control-allow-origin" not in closed.headers
    open_to_one = servers.add(create_app(Settings(cors_origins=("https://a.example",)), fake))
    allowed = httpx.options(open_to_one + CHAT, headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(open_to_one + CHAT, headers=asks | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_every_answer_bears_the_requests_id(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = {client.get("/v1/models", headers={"x-request-id": "no id"}).headers["x-request-id"] for _ in "ab"}
    assert len(ids) == 2
    assert "no id" not in ids
    chat = client.post(CHAT, json=asked(PICTURE), headers={"x-request-id": "mine-2"})
    assert json.loads(chat.text)["id"] == "chatcmpl-mine-2"


def test_the_settings_of_these_tests_are_the_jobs_defaults() -> None:
    defaults: Sequence[str] = ("policy", "token_budget", "alpha", "newlines", "positions", "max_pixels")
    config = Config(input="-", output="-")
    assert all(getattr(SETTINGS.config(), name) == getattr(config, name) for name in defaults)
