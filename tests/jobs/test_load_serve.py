"""The load test counts what it sees: answers, refusals, failures, and streams that break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hired.errors import EngineDeadError
from jobs import load_serve
from jobs.load_serve import Load, bodies, measured, page
from pipeline.serve.app import create_app
from pipeline.serve.settings import Limits, Settings
from tests.pipeline.serve.servers import FakeBackend, Servers


class Sees(FakeBackend):
    """Takes whatever it is shown for a picture."""

    async def see(self, image: bytes, budget: Any, policy: str) -> Any:
        return await super().see(b"picture" + image, budget, policy)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers() as running:
        yield running


@pytest.fixture(autouse=True)
def _warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_serve, "WARM_UP_S", 0.1)


def phase(url: str, **how: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with aiohttp.ClientSession() as session:
            load = Load(
                session, f"{url}/v1/chat/completions", bodies(load_serve.ROOT / "examples" / "scenes", 8)
            )
            return await (load.closed("here", **how) if "clients" in how else load.open("here", **how))

    return asyncio.run(ask())


def test_answers_are_counted_with_their_tokens_and_times(servers: Servers) -> None:
    figures = phase(servers.add(create_app(Settings(), Sees())), clients=3, seconds=2.0)
    assert figures["answers"] > 3
    assert figures["refused"] == figures["failed"] == 0
    assert figures["output_tokens_per_s"] == pytest.approx(3 * figures["answers_per_s"], rel=0.05)
    assert 0 < figures["first_token_s"]["p50"] <= figures["whole_answer_s"]["p50"]
    assert figures["refusal_s"] is None


def test_refusals_are_no_failures(servers: Servers) -> None:
    slow = Sees(words=["a"] * 3, hold_after=1)
    url = servers.add(create_app(Settings(limits=Limits(in_flight=1, request_s=0.3)), slow))
    figures = phase(url, per_second=40.0, seconds=0.5)
    assert set(figures["statuses"]) <= {"503", "error in the stream"}
    assert figures["refused"] > 5
    assert figures["refusal_s"]["p99"] > 0


@pytest.mark.parametrize("in_parts", [True, False])
def test_broken_answers_are_failures(servers: Servers, in_parts: bool) -> None:
    broken = Sees(words=["a"] if in_parts else [])
    broken.error = RuntimeError("broken")
    figures = phase(servers.add(create_app(Settings(), broken)), clients=1, seconds=0.3)
    assert figures["answers"] == 0
    assert figures["failed"] > 0
    assert set(figures["statuses"]) == {"error in the stream" if in_parts else "500"}


def test_the_page_tells_the_gain_and_what_overload_leaves(servers: Servers, tmp_path: Path) -> None:
    phases = asyncio.run(measured(servers.add(create_app(Settings(), Sees())), 2, 0.2, 8, shortest_s=0.2))
    record = {
        "command": "python jobs/load_serve.py",
        "commit": "abc",
        "hardware": "2 cores",
        "versions": {"ray": "2"},
        "max_tokens": 8,
        "phases": phases,
    }
    text = page(json.loads(json.dumps(record)))
    for name in ("one at a time", "2 clients", "4x overload"):
        assert f"| {name} |" in text
    assert "times as fast as one at a time" in text


def test_a_dead_engine_is_a_refusal_before_the_answer_and_a_failure_in_it(servers: Servers) -> None:
    dead = Sees(words=[])
    dead.error = EngineDeadError("dead")
    figures = phase(servers.add(create_app(Settings(), dead)), per_second=20.0, seconds=0.4)
    assert set(figures["statuses"]) == {"503"}
