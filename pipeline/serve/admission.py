"""Room for so many requests at once, in the application and in Ray Serve's proxies. Imports nothing heavy."""

from __future__ import annotations

from pipeline.serve.api_error import SERVER, ApiError, come_back


class Admission:
    """Lets in so many requests at once, and none once it is closed; the others are told when to come back."""

    def __init__(self, in_flight: int, retry_after_s: float) -> None:
        self._in_flight, self._retry_after_s = in_flight, retry_after_s
        self._is_closed = False
        self.num_inside = 0

    @property
    def refusal(self) -> ApiError | None:
        """What one more request would be told; None where there is room for it."""
        if not self._is_closed and self.num_inside < self._in_flight:
            return None
        message = "the server is closing" if self._is_closed else "the server is busy; try again"
        return come_back(503, message, SERVER, "overloaded", self._retry_after_s)

    def close(self) -> None:
        """Let nobody in any more; who is inside may end."""
        self._is_closed = True

    def __enter__(self) -> None:
        if (refusal := self.refusal) is not None:
            raise refusal
        self.num_inside += 1

    def __exit__(self, *_: object) -> None:
        self.num_inside -= 1
