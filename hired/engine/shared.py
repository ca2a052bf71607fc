"""One engine for several threads, whose requests share its batches.

A worker of a job is given its next batch while the last sequences of the one before still run, so the batch
on the device stays full; an endpoint's requests join and leave on their own. One thread runs the engine for
all streams, so a slow listener holds nobody up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeAlias

from hired.engine import Event, Outcome, Request, answers_in_order
from hired.engine.stepped import SteppedEngine
from hired.errors import EngineDeadError

News: TypeAlias = list[Event] | Exception | None


class SharedEngine:
    """Gives ``engine`` to any number of threads. Its own thread lives while there are streams.

    An error of the engine, other than those that are a request's outcome, ends every stream that was open,
    and every later one, in EngineDeadError: nothing on the device can be trusted any more.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._arrived: list[_Stream] = []
        self._streams: list[_Stream] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def counts(self) -> Any:
        """What the engine holds, where it can say so."""
        return getattr(self.engine, "counts", None)

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        """One answer a request, in order."""
        return answers_in_order(self.stream(requests))

    @property
    def error(self) -> Exception | None:
        """What the engine died of, if it did."""
        return self._error

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events as they come. ``requests`` are taken by the engine's thread, as it has room for them."""
        told: SimpleQueue[News] = SimpleQueue()
        close = self.listen(requests, told.put)
        try:
            while (news := told.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                yield from news
        finally:
            close()

    def listen(self, requests: Iterable[Request], tell: Callable[[News], None]) -> Callable[[], None]:
        """As ``stream``, without a thread that waits: ``tell`` hears of everything in the engine's thread.

        The last news is None, or the error that ended the stream. Returns what ends it sooner.
        """
        stream = _Stream(requests, tell)
        with self._lock:
            if self._error is not None:
                raise self._error
            self._arrived.append(stream)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        return stream.close

    def _run(self) -> None:
        try:
            while self._has_streams():
                self._feed()
                self._tell(self.engine.step())
        except Exception as error:
            dead = EngineDeadError(f"the engine failed ({type(error).__name__}); start it again")
            dead.__cause__ = error
            with self._lock:
                self._error = dead
                for stream in (*self._streams, *self._arrived):
                    stream.end(dead)

    def _has_streams(self) -> bool:
        """Takes the streams that arrived; with none left the thread ends, and holds no model any longer."""
        with self._lock:
            self._streams += self._arrived
            self._arrived.clear()
            if not self._streams:
                self._thread = None
        return bool(self._streams)

    def _feed(self) -> None:
        """One request of each stream in turn, while there is room."""
        waiting = self._streams
        while waiting:
            waiting = [s for s in waiting if self.engine.has_room and s.submit_next(self.engine)]

    def _tell(self, events: list[Event]) -> None:
        for stream in self._streams:
            stream.tell(events, self.engine)
        self._streams = [stream for stream in self._streams if not stream.ended]


class _Stream:
    """The requests of one caller, and whom their events are told."""

    def __init__(self, requests: Iterable[Request], tell: Callable[[News], None]) -> None:
        self._source = enumerate(requests)
        self._exhausted = False
        self._index_of: dict[int, int] = {}
        self._news = tell
        self.closed = False
        self.ended = False

    def submit_next(self, engine: SteppedEngine) -> bool:
        """Whether there was another request. An error of the caller's own iterator is its own."""
        if self._exhausted or self.closed or self.ended:
            return False
        try:
            index, request = next(self._source)
        except StopIteration:
            self._exhausted = True
            return False
        except Exception as error:
            self._cancel(engine)
            self.end(error)
            return False
        self._index_of[engine.submit(request)] = index
        return True

    def tell(self, events: list[Event], engine: SteppedEngine) -> None:
        """Passes on what concerns this stream, and ends it after its last request."""
        if self.closed and not self.ended:
            self._cancel(engine)
            self.end()
        own = [
            Event(self._index_of[event.index], event.token_id, event.outcome)
            for event in events
            if event.index in self._index_of
        ]
        for event in events:
            if event.outcome is not None:
                self._index_of.pop(event.index, None)
        if own:
            self._news(own)
        if self._exhausted and not self._index_of and not self.ended:
            self.end()

    def close(self) -> None:
        """Nothing more is wanted."""
        self.closed = True

    def end(self, error: Exception | None = None) -> None:
        self.ended = True
        self._news(error)

    def _cancel(self, engine: SteppedEngine) -> None:
        for handle in self._index_of:
            engine.cancel(handle)
        self._index_of.clear()
