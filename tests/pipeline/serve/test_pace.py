"""Callers are held to their pace, each to its own."""

from __future__ import annotations

import pytest

from pipeline.serve import pace
from pipeline.serve.pace import Pace


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    paced = Pace(6, clock)
    assert [paced.wait_s("a") for _ in range(6)] == [0] * 6
    assert paced.wait_s("a") == pytest.approx(10)
    assert paced.wait_s("b") == 0
    clock.now_s = 10
    assert paced.wait_s("a") == 0
    assert paced.wait_s("a") == pytest.approx(10)


def test_asking_too_early_does_not_prolong_the_wait() -> None:
    clock = Clock()
    paced = Pace(60, clock)
    for _ in range(60):
        paced.wait_s("a")
    for clock.now_s in (0.25, 0.5, 0.75):
        assert paced.wait_s("a") > 0
    clock.now_s = 1.0
    assert paced.wait_s("a") == 0


def test_without_a_limit_nobody_waits() -> None:
    assert not any(Pace(0).wait_s("a") for _ in range(1000))


def test_no_more_callers_are_remembered_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MAX_CALLERS", 3)
    paced = Pace(1, Clock())
    assert [paced.wait_s(name) for name in "abcd"] == [0] * 4
    assert paced.wait_s("d") > 0
    assert paced.wait_s("a") == 0  # forgotten
