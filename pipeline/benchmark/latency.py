"""The section ``latency``: the paper's Table 4 again. Small batches, time to first token, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.benchmark.arms import ARMS, chosen, is_installed
from pipeline.benchmark.bench import Bench, Trial, groups, opened
from pipeline.benchmark.measure import NOT_INSTALLED, NOT_MEASURED, digits, interleaved, percentile, spread
from pipeline.benchmark.subject import Subject

BATCHES = (1, 2, 4)

# Arif et al., arXiv 2408.10945, Table 4: LLaVA-NeXT-7B on one Tesla P40 of 24 GB.
# Tokens a second, seconds to the first token, GB of GPU memory.
PAPER: dict[int, dict[str, tuple[float, float, float] | None]] = {
    1: {"keep-all": (0.49, 19.49, 16.04), "hired-40": (1.40, 6.91, 14.33), "hired-20": (2.30, 4.21, 13.76)},
    2: {"keep-all": (0.66, 44.37, 21.84), "hired-40": (2.04, 14.31, 16.81), "hired-20": (3.68, 7.89, 15.07)},
    4: {"keep-all": None, "hired-40": (2.22, 26.38, 20.36), "hired-20": (4.28, 13.60, 16.99)},
}


def measure(subject: Subject) -> dict[str, Any]:
    """Per batch and arm; the time to first token counts from the pixels, so the encoder is in it."""
    num_images = min(subject.options.latency_images, len(subject.partitions))
    batches = [batch for batch in BATCHES if batch <= num_images]
    cells: dict[str, dict[str, Any]] = {str(batch): dict.fromkeys(ARMS, NOT_MEASURED) for batch in batches}
    for group in groups(subject, chosen(subject.options.arms)):
        if not all(is_installed(arm.system) for arm in group.values()):
            for of_batch in cells.values():
                of_batch |= dict.fromkeys(group, NOT_INSTALLED)
            continue
        with opened(subject, group, None) as benches:
            for batch in batches:
                cells[str(batch)] |= _measured(benches, subject, num_images // batch * batch, batch)
    return {"images": num_images, "batches": cells, "changes": _changes(cells.get("1", {}))}


def _measured(benches: dict[str, Bench], subject: Subject, num_images: int, batch: int) -> dict[str, Any]:
    trials = {name: partial(bench.watch, num_images, batch) for name, bench in benches.items()}
    results = interleaved(trials, subject.options.repeats)
    return {
        name: trials if isinstance(trials, str) else _cell(benches[name], trials, batch)
        for name, trials in results.items()
    }


def _cell(bench: Bench, trials: list[Trial], batch: int) -> dict[str, Any]:
    works = [trial.work for trial in trials]
    first = [seconds for work in works for seconds in work.first_token_s]
    return {
        "output_tokens_per_s": spread([work.completion_tokens / work.total_s for work in works]),
        "first_token_s": spread([percentile(work.first_token_s, 0.5) for work in works]),
        "first_token_p99_s": digits(percentile(first, 0.99)),
        "memory_gib": digits(max(bench.memory_bytes(trial, batch) for trial in trials) / 2**30),
    }


def _changes(cells: dict[str, Any]) -> dict[str, float | str]:
    """What 20 % takes away at batch 1, as shares of keep-all."""
    full, pruned = cells.get("keep-all"), cells.get("hired-20")
    if not isinstance(full, dict) or not isinstance(pruned, dict):
        return dict.fromkeys(("time to first token", "memory"), NOT_MEASURED)
    return {
        "time to first token": digits(
            1 - pruned["first_token_s"]["median"] / full["first_token_s"]["median"]
        ),
        "memory": digits(1 - pruned["memory_gib"] / full["memory_gib"]),
    }
