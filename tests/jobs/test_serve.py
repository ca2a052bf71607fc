"""The command as users start it, on Ray Serve with the embedded model, asked by the clients they have."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import hired
from tests.pipeline.serve.chats import SCENES, asked, data_uri, events, text_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "jobs" / "serve.py")]
LITELLM = ROOT / ".venv" / "litellm"
KEY = "a-key-of-this-server"
MARK = "HIRED_TEST_MARK"
PICTURE = SCENES / "scene-001.jpg"
OTHER = SCENES / "scene-002.jpg"
PROMPT = "Describe the image."
WAIT_S = 240
IN_FLIGHT = 24


@dataclass(frozen=True)
class Served:
    """The running command."""

    url: str
    process: subprocess.Popen[str]
    mark: str
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=WAIT_S)

    def replica(self, deployment: str) -> int:
        """The process that is this deployment's one replica."""
        for folder in Path("/proc").iterdir():
            try:
                if (
                    folder.name.isdigit()
                    and f"ServeReplica:hired:{deployment}" in (folder / "cmdline").read_text()
                    and self.mark in (folder / "environ").read_text(errors="replace")
                ):
                    return int(folder.name)
            except OSError:
                continue
        raise AssertionError(f"no replica of {deployment}; {self.log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mark = uuid.uuid4().hex
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {"HIRED_API_KEY": KEY, "RAY_worker_niceness": "0", MARK: mark}
    options = ["--model", "embedded", "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    limits = ["--limits.in-flight", str(IN_FLIGHT), "--limits.request-s", str(WAIT_S)]
    with log.open("w") as file:
        process = subprocess.Popen(
            COMMAND + options + limits, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("serving"):
                break
        else:
            pytest.fail(log.read_text())
        yield Served(f"http://127.0.0.1:{port}", process, mark, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def expected() -> str:
    """What the model says about the picture without any server."""
    vlm = hired.load("embedded", device="cpu", dtype="float32")
    tokens = vlm.encode([vlm.partition(PICTURE.read_bytes())], budget=hired.Budget(rate=0.2))
    return vlm.generate(tokens, PROMPT, max_new_tokens=64)[0].text


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.1)


# Clients


def test_the_official_client(served: Served, expected: str) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=WAIT_S, max_retries=0) as client:
        [model] = client.models.list().data
        messages: Any = asked(PICTURE, prompt=PROMPT)["messages"]
        whole = client.chat.completions.create(model=model.id, messages=messages, max_tokens=64)
        assert whole.choices[0].message.content == expected
        assert whole.usage is not None
        assert whole.usage.model_extra is not None
        assert whole.usage.model_extra["visual_tokens_kept"] < whole.usage.model_extra["visual_tokens_full"]

        stream = client.chat.completions.create(
            model=model.id,
            messages=messages,
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"hired": {"token_budget": 0.2, "policy": "hired"}},
        )
        chunks = list(stream)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == expected
        assert len(chunks) > 3
        assert chunks[-1].usage == whole.usage

        both = client.chat.completions.create(
            model=model.id, messages=asked(PICTURE, OTHER)["messages"], max_tokens=4
        )
        assert both.usage is not None
        assert both.usage.prompt_tokens > whole.usage.prompt_tokens

        with pytest.raises(openai.BadRequestError) as bad_image:
            client.chat.completions.create(model=model.id, messages=asked(PICTURE, b"no image")["messages"])
        assert bad_image.value.param == "messages[0].content[2].image_url"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            client.chat.completions.create(model=model.id, messages=messages, logprobs=True)
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="another-key-altogether") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


THROUGH_LITELLM = """
import json, sys
import litellm
url, key, picture, other = sys.argv[1:]
def ask(*urls, **options):
    content = [{"type": "text", "text": "Describe the image."}]
    content += [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return litellm.completion(model="openai/embedded", api_base=url, api_key=key, num_retries=0,
                              messages=[{"role": "user", "content": content}], max_tokens=64, **options)
def failure(*urls):
    try:
        ask(*urls)
    except litellm.BadRequestError as error:
        return type(error).__name__
whole = ask(picture)
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in ask(picture, stream=True)),
    "tokens": [whole.usage.prompt_tokens, ask(picture, other).usage.prompt_tokens],
    "failure": failure("data:image/png;base64,AAAA"),
}))
"""


def test_litellm(served: Served, expected: str) -> None:
    assert LITELLM.is_dir(), "LiteLLM pins another version of the official client; `make setup` puts it aside"
    arguments = [f"{served.url}/v1", KEY, data_uri(PICTURE), data_uri(OTHER)]
    ended = subprocess.run(
        [sys.executable, "-c", THROUGH_LITELLM, *arguments],
        env=os.environ | {"PYTHONPATH": str(LITELLM), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["whole"] == told["streamed"] == expected
    assert told["tokens"][1] > told["tokens"][0]
    assert told["failure"] == "BadRequestError"


def test_curl(served: Served, expected: str, tmp_path: Path) -> None:
    assert shutil.which("curl"), "this test needs curl"

    def curl(body: dict[str, Any], *more: str) -> tuple[str, str]:
        """The status, and the body."""
        (tmp_path / "body").write_text(json.dumps(body))
        command = ["curl", "-sN", "-w", "\n%{http_code}", f"{served.url}/v1/chat/completions"]
        headers = ["-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'body'}", *more]
        said = subprocess.run(command + headers, capture_output=True, text=True, timeout=WAIT_S, check=True)
        text, _, status = said.stdout.rpartition("\n")
        return status, text

    key = ("-H", f"Authorization: Bearer {KEY}")
    status, text = curl(asked(PICTURE, max_tokens=64), *key)
    assert (status, json.loads(text)["choices"][0]["message"]["content"]) == ("200", expected)
    status, text = curl(asked(PICTURE, max_tokens=64, stream=True), *key)
    assert (status, text_of(events(text))) == ("200", expected)
    status, text = curl(asked(PICTURE, b"no image"), *key)
    assert (status, json.loads(text)["error"]["code"]) == ("400", "invalid_image")
    status, text = curl(asked(PICTURE))
    assert (status, json.loads(text)["error"]["code"]) == ("401", "invalid_api_key")


# Many at once


def test_requests_share_batches_and_more_than_fit_are_sent_away(served: Served, expected: str) -> None:
    """Every answer is the one that is given alone, or says at once when to come back."""
    running = []

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/chat/completions", json=asked(PICTURE, max_tokens=64))

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            metrics = (await client.get("/metrics")).text
            running.append(float(re.findall(r"^hired_running_sequences\{.*\} (.*)$", metrics, re.M)[0]))

    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=served.url, headers=headers, timeout=WAIT_S, limits=limits
        ) as client:
            watcher = asyncio.create_task(watch(client))
            answers = await asyncio.gather(*(ask(client) for _ in range(3 * IN_FLIGHT)))
            watcher.cancel()
        return answers

    with served.client() as client:
        turned_away_before = overloaded(client)
    answers = asyncio.run(crowd())
    assert {answer.status_code for answer in answers} == {200, 503}
    good = [answer.json() for answer in answers if answer.status_code == 200]
    assert len(good) >= IN_FLIGHT
    assert {answer["choices"][0]["message"]["content"] for answer in good} == {expected}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    assert max(running) > 1, "requests were answered one by one"
    with served.client() as client:
        turned_away = overloaded(client)
    assert turned_away - turned_away_before == len(answers) - len(good), (
        "the door tells how many it sent away"
    )


def overloaded(client: httpx.Client) -> float:
    text = client.get("/metrics").text
    return sum(
        map(float, re.findall(r'^hired_request_failures_total\{code="overloaded"\} (.*)$', text, re.M))
    )


def tokens_told(client: httpx.Client) -> float:
    [tokens] = re.findall(r"^hired_output_tokens_total (.*)$", client.get("/metrics").text, re.M)
    return float(tokens)


def test_clients_that_go_away_leave_the_batch(served: Served) -> None:
    with served.client() as client:
        before = tokens_told(client)
        usage = client.post("/v1/chat/completions", json=asked(PICTURE)).json()["usage"]
        whole = usage["completion_tokens"]
        assert tokens_told(client) == before + whole

        def leave(_: int) -> None:
            body = asked(PICTURE, stream=True)
            with (
                served.client() as own,
                own.stream("POST", "/v1/chat/completions", json=body) as answer,
            ):
                next(answer.iter_bytes())

        with ThreadPoolExecutor(12) as threads:
            list(threads.map(leave, range(12)))
        until(lambda: is_idle(client))
        assert tokens_told(client) < before + 13 * whole, "all were answered to the end"


def is_idle(client: httpx.Client) -> bool:
    """Whether the engine runs nothing and nobody but this question is in flight."""
    text = client.get("/metrics").text
    running = re.findall(r"^hired_(?:running|waiting)_sequences\{.*\} (.*)$", text, re.M)
    [in_flight] = re.findall(r"^hired_requests_in_flight\{.*\} (.*)$", text, re.M)
    return set(running) == {"0.0"} and in_flight == "1.0"


# Deaths


def test_a_generate_replica_that_is_killed_comes_back(served: Served, expected: str) -> None:
    """Streams that had begun end with an error, those that had not are answered by the next replica."""
    replica = served.replica("Generate")

    def ask(_: int) -> str:
        text = ""
        body = asked(PICTURE, stream=True, max_tokens=64)
        with served.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for part in answer.iter_text():
                if '"content":"' in part and not text:
                    kill(replica)
                text += part
            assert answer.status_code in (200, 503), text
        return text

    with ThreadPoolExecutor(16) as threads:
        told = list(threads.map(ask, range(16)))
    streams = [events(text) for text in told if text.startswith("data: ")]
    assert all(stream[-1] is None for stream in streams), "a stream ended without saying so"
    broken = [stream for stream in streams if "error" in stream[-2]]
    assert broken
    assert {stream[-2]["error"]["code"] for stream in broken} == {"unavailable"}
    whole = [stream for stream in streams if stream not in broken]
    assert {text_of(stream) for stream in whole} <= {expected}
    for text in set(told) - {text for text in told if text.startswith("data: ")}:
        assert json.loads(text)["error"]["code"] == "unavailable"

    with served.client() as client:
        later = client.post("/v1/chat/completions", json=asked(PICTURE, max_tokens=64))
        assert later.json()["choices"][0]["message"]["content"] == expected
        assert client.get("/health").status_code == 200
    assert served.replica("Generate") != replica


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


# Beginning and end


def test_it_lets_what_is_begun_end_when_it_is_asked_to(served: Served) -> None:
    """Last in this module: afterwards nobody answers."""
    body = asked(*[PICTURE] * 5, max_tokens=64, stream=True, hired={"policy": "keep-all"})
    with ThreadPoolExecutor(1) as threads, served.client() as client:
        inside = threads.submit(client.post, "/v1/chat/completions", json=body)
        until(lambda: not is_idle(client))
        served.process.send_signal(signal.SIGTERM)
        *_, last, done = events(inside.result().text)
    assert done is None
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert served.process.wait(WAIT_S) == 0, served.log.read_text()[-3000:]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "HIRED_API_KEY"),
        (["--host", "::"], "HIRED_API_KEY"),
        (["--model", "/nowhere/at/all"], "hub id"),
        (["--token-budget", "1"], "token_budget"),
        (["--token-budget", "0.9", "--max-token-budget", "0.5"], "max_token_budget"),
        (["--limits.images", "none"], "limits.images"),
        (["--tokens", "1"], "--tokens"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options_end_it_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    from jobs import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HIRED_API_KEY", raising=False)
        patch.setattr(serve, "run", lambda *_: pytest.fail("it was started"))
        patch.setattr(sys, "stderr", said := _Said())
        assert serve.main(arguments) == 2
    assert words in said.text


class _Said:
    text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "key"),
    [(["--host", "0.0.0.0"], KEY), (["--host", "0.0.0.0", "--without-keys"], ""), (["--host", "::1"], "")],
)
def test_it_listens_elsewhere_with_keys_or_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], key: str
) -> None:
    from jobs import serve

    started = []
    monkeypatch.setenv("HIRED_API_KEY", key)
    monkeypatch.setattr(serve, "run", lambda *given: started.append(given))
    assert serve.main(arguments) == 0
    assert len(started) == 1
