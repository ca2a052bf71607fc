"""An engine without a model, for tests of everything around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from hired.engine import Completion, Event, Outcome, Request, answers_in_order
from hired.errors import CapacityError


class FakeEngine:
    """Answers every request with the ids that ``answer`` gives for it, cut at ``max_new_tokens``.

    Keeps the requests it was given; refuses those beyond ``max_positions`` as a real engine does.
    """

    def __init__(
        self, answer: Callable[[Request], Sequence[int]], *, max_positions: int | None = None
    ) -> None:
        self._answer = answer
        self._max_positions = max_positions
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        return answers_in_order(self.stream(requests))

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        for index, request in enumerate(requests):
            self.requests.append(request)
            outcome = self._complete(request)
            for token_id in outcome.token_ids if isinstance(outcome, Completion) else ():
                yield Event(index, token_id)
            yield Event(index, outcome=outcome)

    def _complete(self, request: Request) -> Outcome:
        try:
            request.check_fits(self._max_positions)
        except CapacityError as error:
            return error
        ids = tuple(self._answer(request))
        cut = ids[: request.max_new_tokens]
        return Completion(cut, "stop" if len(ids) < request.max_new_tokens else "length")
