"""Answers of many arms to many questions about a few pictures, as cheaply as they can be had.

The tower looks at a picture once, and all arms choose from what it saw. The questions about a picture share
what an arm kept of it: the first one is asked ahead, the others find its tokens in the KV cache. Pictures
that wait there are few, so the questions go in waves of as many; whichever takes longest to answer is asked
first and answered beside the waves that follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hired.encoder import Encoder
from hired.engine import Completion, Engine, Event, Outcome, Request
from hired.engine.continuous import MAX_PREFIXES
from hired.errors import GenerationError
from hired.evaluation.arms import Arm
from hired.evaluation.items import Item
from hired.generator import Generator
from hired.types import Partitions, VisualTokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``arm`` said to ``item``, and the visual tokens that reached the language model for it.

    ``num_tokens`` are the policy's, ``num_newlines`` come beside them.
    """

    item: Item
    arm: Arm
    text: str
    num_tokens: int
    num_newlines: int


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """All that is asked about one picture under one arm, the longest answer first."""

    arm: Arm
    tokens: VisualTokens
    items: tuple[Item, ...]
    generator: Generator
    num_newlines: int

    def answer(self, item: Item, outcome: Outcome) -> Answer:
        if not isinstance(outcome, Completion):
            raise GenerationError(f"{self.arm.name} cannot answer {item.key}: {outcome}") from outcome
        text = self.generator.text(outcome)
        return Answer(item, self.arm, text, len(self.tokens), self.num_newlines)


class Respondent:
    """Asks a model's two halves."""

    def __init__(self, encoder: Encoder, generator: Generator) -> None:
        self._encoder, self._generator = encoder, generator

    def answers(
        self, pictures: Sequence[tuple[Partitions, Sequence[Item]]], arms: Sequence[Arm]
    ) -> list[Answer]:
        """Every arm's answer to every item, in order of arms, pictures and items.

        Raises GenerationError where a question cannot be answered, since an answer that is missing is not
        a wrong one.
        """
        found: dict[tuple[int, str], Answer] = {}
        groups = self._groups(pictures, arms)
        for number, answer in _asked(groups, self._generator.engine):
            found[number, answer.item.key] = answer
        in_order = enumerate(itertools.product(arms, pictures))
        return [found[number, item.key] for number, (_, (_, items)) in in_order for item in items]

    def _groups(
        self, pictures: Sequence[tuple[Partitions, Sequence[Item]]], arms: Sequence[Arm]
    ) -> Iterator[_Group]:
        choices = [(arm.policy, arm.budget) for arm in arms]
        kept = self._encoder.encode_each([partitions for partitions, _ in pictures], choices)
        for arm, by_picture in zip(arms, kept, strict=True):
            generator = self._generator.packing(arm.newlines, arm.positions)
            for tokens, (_, items) in zip(by_picture, pictures, strict=True):
                longest_first = sorted(items, key=lambda item: -item.max_new_tokens)
                num_newlines = len(generator.layout(tokens)) - len(tokens)
                yield _Group(arm, tokens, tuple(longest_first), generator, num_newlines)


def _asked(groups: Iterator[_Group], engine: Engine) -> Iterator[tuple[int, Answer]]:
    """The answers with the number of their group, in the order in which they come."""
    open_leaders: list[_Stream] = []
    numbered = ((number, group) for number, group in enumerate(groups) if group.items)
    while wave := list(itertools.islice(numbered, MAX_PREFIXES)):
        requests = {
            number: group.generator.requests(
                group.tokens,
                [item.question for item in group.items],
                max_new_tokens=[item.max_new_tokens for item in group.items],
            )
            for number, group in wave
        }
        ahead = _Stream(engine, [(*pair, pair[1].items[0]) for pair in wave], requests)
        ahead.wait_for_first_tokens()
        open_leaders.append(ahead)
        rest = [(*pair, item) for pair in wave for item in pair[1].items[1:]]
        yield from _Stream(engine, rest, requests).answers()
    for stream in open_leaders:
        yield from stream.answers()


class _Stream:
    """Questions on their way through the engine."""

    def __init__(
        self,
        engine: Engine,
        asked: Sequence[tuple[int, _Group, Item]],
        requests: dict[int, Iterator[Request]],
    ) -> None:
        self._asked = asked
        # Made when the engine has room: embeddings of all prompts at once would take gigabytes.
        self._events = engine.stream(next(requests[number]) for number, _, _ in asked)
        self._told: list[Event] = []

    def wait_for_first_tokens(self) -> None:
        """Returns when every prompt has been computed."""
        waiting = set(range(len(self._asked)))
        while waiting:
            event = next(self._events)
            self._told.append(event)
            waiting.discard(event.index)

    def answers(self) -> Iterator[tuple[int, Answer]]:
        for event in itertools.chain(self._told, self._events):
            if event.outcome is not None:
                number, group, item = self._asked[event.index]
                yield number, group.answer(item, event.outcome)
