"""Timers that wait for the device, repeats that take turns, medians with their spread, and caps on memory."""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from hired.errors import CapacityError

T = TypeVar("T")

NOT_MEASURED = "not measured"
NOT_INSTALLED = "not installed"
OUT_OF_MEMORY = "out of memory"

GIB = 2**30

log = logging.getLogger(__name__)


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for all work given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of repeats between the smallest and the largest, as the record keeps them."""
    return {
        "median": digits(statistics.median(values)),
        "min": digits(min(values)),
        "max": digits(max(values)),
    }


def digits(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def interleaved(trials: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T] | str]:
    """The results of every trial, one a round; the trials take turns, so that all meet the same machine.

    A first round warms up and is left out. A trial that runs out of memory once is not tried again.
    """
    results: dict[str, list[T]] = {name: [] for name in trials}
    failed: set[str] = set()
    for number in range(repeats + 1):
        for name, trial in trials.items():
            if name in failed:
                continue
            started_s = time.perf_counter()
            try:
                result = trial()
            except (torch.OutOfMemoryError, CapacityError):
                failed.add(name)
            if name in failed:
                release()  # only now does no traceback hold the tensors any more
                continue
            log.info("round %d, %s: %.2f s", number, name, time.perf_counter() - started_s)
            if number:
                results[name].append(result)
    return {name: OUT_OF_MEMORY if name in failed else found for name, found in results.items()}


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def capped(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Let this process have ``limit_bytes`` of a GPU, as if it were that small; on CPUs nothing happens."""
    if device.type != "cuda" or limit_bytes is None:
        yield
        return
    release()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def with_peak_bytes(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What ``work`` returns, and the most memory that tensors took meanwhile; None on CPUs."""
    if device.type != "cuda":
        return work(), None
    torch.cuda.reset_peak_memory_stats(device)
    return work(), torch.cuda.max_memory_allocated(device)


def median_of(cell: Any) -> float | None:
    """The median of a cell of the record; None where it holds words instead."""
    return cell["median"] if isinstance(cell, dict) else None


def ratio(numerator: Any, denominator: Any) -> float | str:
    """The ratio of two cells' medians, or "not measured"."""
    top, bottom = median_of(numerator), median_of(denominator)
    return digits(top / bottom) if top is not None and bottom else NOT_MEASURED
