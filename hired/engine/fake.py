"""An engine without a model, for tests of everything around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hired.engine import Completion, Request
from hired.errors import CapacityError, GenerationError


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

    def generate(self, requests: Sequence[Request]) -> list[Completion | GenerationError]:
        self.requests.extend(requests)
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion | GenerationError:
        try:
            request.check_fits(self._max_positions)
        except CapacityError as error:
            return error
        ids = tuple(self._answer(request))
        cut = ids[: request.max_new_tokens]
        return Completion(cut, "stop" if len(ids) < request.max_new_tokens else "length")
