"""Continuous batching over a KV arena: sequences join and leave between any two passes.

    waiting --admit--> running --pass--> drawn --collect--> events

One pass a step: every decoding sequence brings its last token, and prompts bring as many tokens as
``prefill_tokens`` allows, so that decoding rides along with the arithmetic of prefill. How many sequences run
together follows from the bytes of the KV cache and the lengths of the prompts, never from a constant; dropped
visual tokens are freed places, and freed places are a larger batch.

On a GPU a pass is launched before the tokens of the one before have come back, so the device never waits for
the host. A sequence that turns out to have ended has then run one token too far, which is thrown away.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hired.devices import sent
from hired.engine import EngineOptions, Event, Outcome, Request, answers_in_order
from hired.engine.answer import Answer
from hired.engine.cuda_graphs import DecodeGraphs
from hired.engine.decoder import Decoder
from hired.engine.kv_cache import KVCache, Segment
from hired.engine.memory import kv_cache_bytes, prefill_tokens
from hired.engine.ragged_attention import VarlenAttention, ragged_attention
from hired.engine.sampling import choose
from hired.engine.sequence import Sequence
from hired.engine.stepped import streamed
from hired.errors import CapacityError, ConfigurationError

log = logging.getLogger(__name__)

MIN_PREFILL_TOKENS = 16
MAX_PREFIXES = 16


@dataclass(frozen=True, slots=True)
class Counts:
    """What an engine holds: for metrics, and for tests that nothing leaks."""

    num_waiting: int
    num_running: int
    num_places_free: int
    num_places: int


class ContinuousEngine:
    """Continues prompts with a ``Decoder``, as many at a time as its KV cache holds.

    ``eos_token_ids`` end an answer; ``decode`` turns ids into the text in which stop strings are sought.
    Not for use from several threads at once. Raises ConfigurationError when there is no memory for a cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        eos_token_ids: Collection[int],
        decode: Callable[[Several[int]], str],
        options: EngineOptions | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.decoder = decoder
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        self._prefill_tokens = prefill_tokens(decoder, options)
        self._max_running = options.max_sequences
        num_places = kv_cache_bytes(decoder, options) // decoder.shape.kv_bytes_per_token
        self.cache = _cache(decoder, num_places)
        self._attention = ragged_attention(self.cache)
        self._graphs = (
            DecodeGraphs(decoder, self.cache, self._attention)
            if isinstance(self._attention, VarlenAttention)
            else None
        )
        self._capacity = self.cache.arena.num_free
        self._lag = 1 if decoder.device.type == "cuda" else 0
        # The last token drawn for the sequence whose extent starts here; it never has to visit the host.
        self._last_ids = torch.zeros(self.cache.num_places, dtype=torch.int64, device=decoder.device)
        self._prefixes: dict[tuple[int, ...], Tensor] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._in_flight: deque[_Pass] = deque()
        self._refused: list[Event] = []
        self._num_submitted = 0

    @property
    def counts(self) -> Counts:
        """See ``Counts``."""
        arena = self.cache.arena
        return Counts(len(self._waiting), len(self._running), arena.num_free, arena.num_places)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        return bool(self._waiting or self._running or self._in_flight or self._refused)

    @property
    def has_room(self) -> bool:
        """Whether another request could join the next pass, as far as can be told without knowing it."""
        return not self._waiting and not self._is_full and self._num_unseen < self._prefill_tokens

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        """One answer a request, in order; those that can never fit are CapacityErrors and take no room."""
        return answers_in_order(self.stream(requests))

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events as they come. Closing the iterator cancels what it has not told yet."""
        return streamed(self, requests)

    @torch.inference_mode()
    def submit(self, request: Request) -> int:
        """A handle for the request, which joins the batch when there is room. Its events come from ``step``.

        What the request can never fit is told by its first event, a CapacityError.
        """
        handle = self._num_submitted
        self._num_submitted += 1
        sequence = Sequence(handle, request, Answer(request, self._eos_token_ids, self._decode))
        try:
            request.check_fits(self.decoder.max_positions)
            if sequence.num_places > self._capacity:
                raise CapacityError(
                    f"the prompt and its answer need {sequence.num_places} places in the key-value cache, "
                    f"which has {self._capacity}: keep fewer visual tokens, lower max_new_tokens, or "
                    "give the cache more memory"
                )
        except CapacityError as error:
            self._refused.append(Event(handle, outcome=error))
        else:
            self._waiting.append(sequence)
            self._admit()
        return handle

    def cancel(self, handle: int) -> None:
        """Forget a request; nothing is told about it any more. Unknown and ended ones are ignored."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.handle != handle)
        self._refused = [event for event in self._refused if event.index != handle]
        if handle in self._running:
            self._leave(self._running[handle])
        for launched in self._in_flight:
            launched.forget(handle)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admits what fits, launches one pass, and tells what has come back of the passes before."""
        events, self._refused = self._refused, []
        self._admit()
        segments = self._segments()
        try:
            if segments:
                self._in_flight.append(self._launch(segments))
        except torch.OutOfMemoryError as error:
            return events + self._relieve(error)
        while len(self._in_flight) > (self._lag if segments else 0):
            events += self._collect(self._in_flight.popleft())
        return events

    @property
    def _is_full(self) -> bool:
        return self._max_running is not None and len(self._running) >= self._max_running

    @property
    def _num_unseen(self) -> int:
        return sum(sequence.num_unseen for sequence in self._running.values())

    def _admit(self) -> None:
        """First come, first served: a long prompt is not overtaken for ever by short ones."""
        arena = self.cache.arena
        while self._waiting and not self._is_full and self._num_unseen < self._prefill_tokens:
            sequence = self._waiting[0]
            sequence.extent = arena.allocate(sequence.num_places)
            if sequence.extent is None:
                return
            self._running[sequence.handle] = self._waiting.popleft()
            ids = sequence.request.shared_prefix
            prefix = self._prefixes.pop(ids, None)
            if prefix is not None:
                self._prefixes[ids] = prefix  # the last one used is the last one given up
                self.cache.put(sequence.extent.start, prefix)
                sequence.num_cached = len(ids)

    def _segments(self) -> list[tuple[Sequence, Segment]]:
        """What the next pass works on, in order of the extents."""
        room = self._prefill_tokens
        segments = []
        for sequence in self._running.values():
            if sequence.is_drawn or (sequence.num_unseen and not room):
                continue
            segment = sequence.segment(room)
            room -= segment.num_new if sequence.num_unseen else 0
            segments.append((sequence, segment))
        return sorted(segments, key=lambda pair: pair[1].start)

    def _launch(self, segments: list[tuple[Sequence, Segment]]) -> _Pass:
        if self._graphs and all(sequence.is_decoding for sequence, _ in segments):
            positions = [sequence.next_position for sequence, _ in segments]
            logits = self._graphs.logits([segment for _, segment in segments], positions, self._last_ids)
            rows = list(range(len(segments)))
        else:
            logits, rows = self._logits(segments)
        drawing = [segments[row][0] for row in rows]
        ids = choose(
            logits,
            [sequence.request.sampling for sequence in drawing],
            [sequence.num_sampled for sequence in drawing],
        )
        self._last_ids[self._places([segments[row][1].start for row in rows])] = ids.clamp(min=0)
        for sequence, segment in segments:
            sequence.advance(segment)
            self._keep_prefix(sequence, segment)
        return _Pass(drawing, ids)

    def _logits(self, segments: list[tuple[Sequence, Segment]]) -> tuple[Tensor, list[int]]:
        """Scores for the next token of the sequences whose prompts are complete, and which those are."""
        embeddings, positions = self._inputs(segments)
        attend = self._attention.attend([segment for _, segment in segments])
        states = self.decoder.forward(embeddings, sent(positions, self.decoder.device), attend)
        last, rows, end = [], [], 0
        for row, (sequence, segment) in enumerate(segments):
            end += segment.num_new
            if segment.num_after >= sequence.num_prompt:
                last.append(end - 1)
                rows.append(row)
        return self.decoder.logits(states[self._places(last)]), rows

    def _inputs(self, segments: list[tuple[Sequence, Segment]]) -> tuple[Tensor, Tensor]:
        """The pass's embeddings ``[n, d]``, and its positions ``[n]`` on the host."""
        starts = [segment.start for sequence, segment in segments if sequence.is_decoding]
        decoded = self.decoder.embed(self._last_ids[self._places(starts)])
        if len(starts) == len(segments):
            return decoded, torch.tensor([sequence.next_position for sequence, _ in segments])
        tokens, last_tokens = [], iter(torch.split(decoded, 1))
        positions = []
        for sequence, segment in segments:
            if sequence.is_decoding:
                tokens.append(next(last_tokens))
                positions.append(torch.tensor([sequence.next_position]))
            else:
                part = slice(segment.num_cached, segment.num_after)
                tokens.append(sequence.embeddings[part].to(decoded))
                positions.append(sequence.positions[part])
        return torch.cat(tokens), torch.cat(positions)

    def _places(self, indices: Several[int]) -> Tensor:
        return sent(torch.tensor(indices, dtype=torch.int64), self.decoder.device)

    def _keep_prefix(self, sequence: Sequence, segment: Segment) -> None:
        """The pass in which the first prompt of its kind gets past it computes its shared prefix for all.

        Later passes of the same sequence keep nothing: by then others may need the room.
        """
        ids = sequence.request.shared_prefix
        if segment.num_cached < len(ids) <= segment.num_after and ids not in self._prefixes:
            if len(self._prefixes) == MAX_PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            assert sequence.extent is not None
            self._prefixes[ids] = self.cache.read(sequence.extent.start, len(ids))

    def _collect(self, launched: _Pass) -> list[Event]:
        events = []
        for sequence, token_id in launched.drawn():
            answer = sequence.answer
            if answer.outcome is not None:
                continue
            taken = answer.take(token_id)
            if token_id < 0 and sequence.extent is not None:
                self.cache.clear(sequence.extent)
            if answer.outcome is not None:
                self._leave(sequence)
            events.append(Event(sequence.handle, taken, answer.outcome))
        return events

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.handle]
        assert sequence.extent is not None
        self.cache.arena.free(sequence.extent)
        sequence.extent = None

    def _relieve(self, error: torch.OutOfMemoryError) -> list[Event]:
        """After a pass that the device had no memory for: half the sequences wait, half the prefill a pass.

        A sequence that is alone with the smallest pass and still has no memory can only be refused.
        """
        events = [event for launched in self._in_flight for event in self._collect(launched)]
        self._in_flight.clear()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        running = list(self._running.values())
        stays = len(running) // 2
        if len(running) == 1 and self._prefill_tokens == MIN_PREFILL_TOKENS:
            self._leave(running[0])
            refusal = CapacityError(f"the device has no memory for this prompt, even alone ({error})")
            return [*events, Event(running[0].handle, outcome=refusal)]
        self._prefill_tokens = max(MIN_PREFILL_TOKENS, self._prefill_tokens // 2)
        for sequence in reversed(running[max(1, stays) :]):
            self._leave(sequence)
            sequence.begin_again(self.decoder.embed)
            self._waiting.appendleft(sequence)
        self._max_running = max(1, stays)
        log.warning(
            "out of memory with %d sequences: going on with %d, and %d prompt tokens a pass",
            len(running), self._max_running, self._prefill_tokens,
        )  # fmt: skip
        return events


class _Pass:
    """A pass that was launched: whose tokens it draws, and where they will be on the host."""

    def __init__(self, drawing: list[Sequence], ids: Tensor) -> None:
        self._drawing: list[Sequence | None] = list(drawing)
        self._done: Any = None
        if ids.device.type == "cuda":
            self._ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            self._ids = ids

    def forget(self, handle: int) -> None:
        self._drawing = [None if s is not None and s.handle == handle else s for s in self._drawing]

    def drawn(self) -> Iterator[tuple[Sequence, int]]:
        """The tokens, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        for sequence, token_id in zip(self._drawing, self._ids.tolist(), strict=True):
            if sequence is not None:
                yield sequence, token_id


def _cache(decoder: Decoder, num_places: int) -> KVCache:
    if num_places < 1:
        raise ConfigurationError(
            "no memory is left for the key-value cache: use a larger card, fewer bits (quantisation), or "
            "raise memory_fraction"
        )
    try:
        return KVCache(decoder.shape, num_places, decoder.device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        num_bytes = num_places * decoder.shape.kv_bytes_per_token
        raise ConfigurationError(
            f"{num_bytes / 2**30:.1f} GiB for the key-value cache are not there; lower kv_cache_bytes"
        ) from error
