"""How often one caller may ask."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

# Callers that are remembered; the one that was silent for longest is forgotten first.
MAX_CALLERS = 10_000


class Pace:
    """Lets each caller ask ``per_minute`` times a minute, as many of them at once; 0 lets everybody."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """0 if the caller may ask now, which counts; else the seconds until it may."""
        if not self._per_minute:
            return 0.0
        now_s = self._clock()
        left, then_s = self._callers.pop(caller, (float(self._per_minute), now_s))
        left = min(self._per_minute, left + (now_s - then_s) * self._per_minute / 60)
        wait_s = 0.0 if left >= 1 else (1 - left) * 60 / self._per_minute
        self._callers[caller] = (left - 1 if left >= 1 else left, now_s)
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        return wait_s
