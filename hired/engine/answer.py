"""One request's tokens so far, and when they are enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from hired.engine import Completion, FinishReason, Outcome, Request
from hired.errors import GenerationError

# Tokens that may add no character to the text, special ones among them, before a stop string is missed.
_SILENT_TOKENS = 16


class Answer:
    """Takes tokens until the request's limit, an end-of-sequence token, or a stop string.

    ``eos_token_ids`` end an answer; ``decode`` turns ids into the text in which stop strings are sought.
    """

    def __init__(
        self, request: Request, eos_token_ids: Collection[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._request = request
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        # Only the end of the text can complete a stop string, and a token holds a byte of it at least.
        self._tail = max((len(stop.encode()) for stop in request.stop), default=0) + _SILENT_TOKENS
        self.token_ids: list[int] = []
        self.outcome: Outcome | None = None

    def take(self, token_id: int) -> int | None:
        """Adds the next token, unless the answer has ended; returns it if it is part of the answer.

        A ``token_id`` of -1 says that the scores were not numbers: their argmax would be an id like any
        other, and the caption fluent nonsense.
        """
        if self.outcome is not None:
            return None
        if token_id < 0:
            self.outcome = GenerationError(
                "the language model's scores are not numbers; run it in bfloat16 or float32"
            )
            return None
        if token_id in self._eos_token_ids:
            self._end("stop")
            return None
        self.token_ids.append(token_id)
        if self._holds_stop_string():
            self._end("stop")
        elif len(self.token_ids) == self._request.max_new_tokens:
            self._end("length")
        return token_id

    def _holds_stop_string(self) -> bool:
        if not self._request.stop:
            return False
        text = self._decode(self.token_ids[-self._tail :])
        return any(stop in text for stop in self._request.stop)

    def _end(self, reason: FinishReason) -> None:
        self.outcome = Completion(tuple(self.token_ids), reason)
