"""Engines that work in steps: requests are submitted and cancelled between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from hired.engine import Event, Request
from hired.errors import ConfigurationError


class SteppedEngine(Protocol):
    """What runs requests step by step; not for use from several threads at once."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether another request could join soon, as far as can be told without knowing it."""
        ...

    def submit(self, request: Request) -> int:
        """A handle for the request, whose events come from ``step``; the first may be its refusal."""
        ...

    def cancel(self, handle: int) -> None:
        """Forget a request; nothing is told about it any more. Unknown and ended ones are ignored."""
        ...

    def step(self) -> list[Event]:
        """What one step brought; events bear handles."""
        ...


def streamed(engine: SteppedEngine, requests: Iterable[Request]) -> Iterator[Event]:
    """The events of the requests, which are taken as there is room, by their index among them.

    Closing the iterator cancels what it has not told yet.
    """
    if engine.has_work:
        raise ConfigurationError("the engine is in use: one stream at a time, or submit and step")
    source = enumerate(requests)
    index_of: dict[int, int] = {}
    exhausted = False
    try:
        while not exhausted or engine.has_work:
            while not exhausted and engine.has_room:
                index, request = next(source, (-1, None))
                exhausted = request is None
                if request is not None:
                    index_of[engine.submit(request)] = index
            for event in engine.step():
                yield Event(index_of[event.index], event.token_id, event.outcome)
                if event.outcome is not None:
                    del index_of[event.index]
    finally:
        for handle in index_of:
            engine.cancel(handle)
