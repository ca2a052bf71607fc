"""Load on the endpoint over loopback: many clients, too many clients, and one alone to compare with.

    python jobs/load_serve.py --seconds 120 --clients 64 --output docs/results

Starts jobs/serve.py on this machine, asks it about the sample scenes over HTTP, and writes serving.json and
serving.md. Answers are streamed, so the first token's time is the client's. Clients and server share the
machine's cores. Exit code 1 when anything failed that is neither a 429 nor a 503.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

import aiohttp
import numpy as np

from hired.devices import describe_hardware, resolve_device
from pipeline.benchmark.record import commit
from pipeline.manifest import versions
from pipeline.storage import Store

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Describe the image."
MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
# Refused requests are part of the design; anything else is a failure.
REFUSALS = (429, 503)
OVERLOAD = 4
# With all that the server lets in, the first answers come after 15 s on two cores.
WARM_UP_S = 30.0
START_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Tally:
    """What clients saw of one phase. Answers count that ended while it was measured."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    tokens: int = 0

    def figures(self, name: str, seconds: float, arrivals: str) -> dict[str, Any]:
        """The phase's row."""
        done = self.statuses["200"]
        refused = sum(self.statuses[str(status)] for status in REFUSALS)
        return {
            "name": name,
            "arrivals": arrivals,
            "seconds": round(seconds, 1),
            "answers": done,
            "refused": refused,
            "failed": sum(self.statuses.values()) - done - refused,
            "statuses": dict(self.statuses),
            "answers_per_s": round(done / seconds, 2),
            "output_tokens_per_s": round(self.tokens / seconds, 1),
            "first_token_s": _percentiles(self.first_token_s),
            "whole_answer_s": _percentiles(self.whole_s),
            "refusal_s": _percentiles(self.refused_s),
        }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(float(np.percentile(values, q)), 4) for name, q in (("p50", 50), ("p99", 99))}


class Load:
    """Asks an endpoint about pictures, in turn."""

    def __init__(self, session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes]) -> None:
        self._session, self._url, self._bodies = session, url, bodies
        self._turn = count()
        self._tally = Tally()

    async def closed(self, name: str, clients: int, seconds: float) -> dict[str, Any]:
        """Clients that ask again as soon as they are answered."""

        async def client(end_s: float) -> None:
            while time.perf_counter() < end_s:
                wait_s = await self._ask()
                if wait_s:
                    await asyncio.sleep(wait_s)

        async def crowd(end_s: float) -> None:
            await asyncio.gather(*(client(end_s) for _ in range(clients)))

        return await self._measured(name, seconds, f"{clients} clients, one after the other", crowd)

    async def open(self, name: str, per_second: float, seconds: float) -> dict[str, Any]:
        """Requests that come whether or not others are answered, at random times."""
        draws = random.Random(0)

        async def crowd(end_s: float) -> None:
            tasks = set()
            while time.perf_counter() < end_s:
                await asyncio.sleep(draws.expovariate(per_second))
                task = asyncio.create_task(self._ask())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

        return await self._measured(name, seconds, f"{per_second:.3g} a second, at random times", crowd)

    async def _measured(
        self, name: str, seconds: float, arrivals: str, crowd: Callable[[float], Awaitable[None]]
    ) -> dict[str, Any]:
        """What ends between the warm-up and the end; what is still on its way then is not counted."""
        started_s = time.perf_counter()
        running = asyncio.ensure_future(crowd(started_s + WARM_UP_S + seconds))
        await asyncio.sleep(WARM_UP_S)
        self._tally = tally = Tally()
        await asyncio.sleep(seconds)
        self._tally = Tally()
        await running
        late = self._tally  # failures count whenever they come
        tally.statuses += Counter(
            {status: n for status, n in late.statuses.items() if status not in ("200", *map(str, REFUSALS))}
        )
        figures = tally.figures(name, seconds, arrivals)
        print(json.dumps(figures), file=sys.stderr)
        return figures

    async def _ask(self) -> float:
        """One request; returns the seconds after which the server wants to be asked again."""
        body = self._bodies[next(self._turn) % len(self._bodies)]
        started_s = time.perf_counter()
        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                if answer.status != 200:
                    await answer.read()
                    self._tally.statuses[str(answer.status)] += 1
                    if answer.status in REFUSALS:
                        self._tally.refused_s.append(time.perf_counter() - started_s)
                    return float(answer.headers.get("Retry-After", 0))
                await self._read(answer, started_s)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._tally.statuses[type(error).__name__] += 1
        return 0.0

    async def _read(self, answer: aiohttp.ClientResponse, started_s: float) -> None:
        first_s, last = None, b""
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter()
                last = line
                if line.startswith(b'data: {"error"'):
                    self._tally.statuses["error in the stream"] += 1
                    return
        ended_s, tally = time.perf_counter(), self._tally
        if first_s is None or b'"completion_tokens"' not in last:
            tally.statuses["cut off"] += 1
            return
        tally.statuses["200"] += 1
        tally.tokens += json.loads(last[6:])["usage"]["completion_tokens"]
        tally.first_token_s.append(first_s - started_s)
        tally.whole_s.append(ended_s - started_s)


def bodies(folder: Path, max_tokens: int) -> list[bytes]:
    """A request about each picture of the folder."""
    found = sorted(path for path in folder.iterdir() if path.name.startswith("scene"))
    return [
        json.dumps(
            {
                "model": "embedded",
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": max_tokens,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": PROMPT},
                            {"type": "image_url", "image_url": {"url": _data_uri(path)}},
                        ],
                    }
                ],
            }
        ).encode()
        for path in found
        if path.suffix in MEDIA_TYPES
    ]


def _data_uri(path: Path) -> str:
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@contextmanager
def endpoint(options: Sequence[str]) -> Iterator[str]:
    """The address of a server of our own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != "HIRED_API_KEY"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout
        if not any(line.startswith("serving") for line in process.stdout):
            raise RuntimeError(f"the server ended before it was ready: {shlex.join(command)}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def measured(
    url: str, clients: int, seconds: float, max_tokens: int, shortest_s: float = 5.0
) -> list[dict[str, Any]]:
    """One client alone, many, and four times the requests that the many were answered."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, f"{url}/v1/chat/completions", bodies(ROOT / "examples" / "scenes", max_tokens))
        alone = await load.closed("one at a time", 1, max(shortest_s, seconds / 4))
        many = await load.closed(f"{clients} clients", clients, seconds)
        rate = OVERLOAD * max(many["answers_per_s"], 0.1)
        too_many = await load.open(f"{OVERLOAD}x overload", rate, max(shortest_s, seconds / 2))
        return [alone, many, too_many]


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "phase": lambda phase: phase["name"],
    "requests": lambda phase: phase["arrivals"],
    "answers": lambda phase: phase["answers"],
    "refused (429, 503)": lambda phase: phase["refused"],
    "failed": lambda phase: phase["failed"],
    "answers/s": lambda phase: phase["answers_per_s"],
    "output tokens/s": lambda phase: phase["output_tokens_per_s"],
    "first token s, p50 / p99": lambda phase: _both(phase["first_token_s"]),
    "whole answer s, p50 / p99": lambda phase: _both(phase["whole_answer_s"]),
    "refusal s, p50 / p99": lambda phase: _both(phase["refusal_s"]),
}


def page(record: dict[str, Any]) -> str:
    """The record for readers."""
    alone, many, too_many = record["phases"]
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = [[str(value(phase)) for value in COLUMNS.values()] for phase in record["phases"]]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Load on the endpoint

{record["hardware"]}; {known}; commit {record["commit"]}. The embedded model and its sample scenes, answers
of at most {record["max_tokens"]} tokens, streamed. Clients and server share the cores.

{table}

- Requests that share batches are answered {_ratio(many, alone):.2f} times as fast as one at a time.
- Of {OVERLOAD} times the requests that it can answer it answers {_ratio(too_many, many):.0%} of its capacity.

    {record["command"]}
"""


def _both(figures: dict[str, float] | None) -> str:
    return "-" if figures is None else f"{figures['p50']:.3f} / {figures['p99']:.3f}"


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(one["answers_per_s"] / max(other["answers_per_s"], 1e-9))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64, help="clients at once [64]")
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds with all clients [120]")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of an answer at most [64]")
    parser.add_argument("--output", type=Path, required=True, help="folder of serving.json and serving.md")
    parser.add_argument("options", nargs="*", help="options of jobs/serve.py, after --")
    given = parser.parse_args(arguments)
    with endpoint(given.options) as url:
        phases = asyncio.run(measured(url, given.clients, given.seconds, given.max_tokens))
    known = versions()
    record = {
        "command": shlex.join(["python", "jobs/load_serve.py", *arguments]),
        "commit": commit(),
        "hardware": describe_hardware(resolve_device(None)),
        "versions": {name: known[name] for name in ("python", "torch", "transformers", "ray")},
        "max_tokens": given.max_tokens,
        "phases": phases,
    }
    store = Store(given.output)
    store.write("serving.json", (json.dumps(record, indent=2) + "\n").encode())
    store.write("serving.md", page(record).encode())
    print(page(record))
    return 1 if any(phase["failed"] for phase in phases) else 0


if __name__ == "__main__":
    sys.exit(main())
