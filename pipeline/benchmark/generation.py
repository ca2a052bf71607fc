"""The section ``engine``: encode and generate, every arm at one common batch and at its own best, under caps.

Our arms' own batch is whatever the engine admits: all images are handed over at once. The baseline's is
searched, because ``generate`` has no opinion: the fastest of a list of batch sizes that its memory holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pipeline.benchmark.arms import ARMS, chosen, is_installed
from pipeline.benchmark.bench import Bench, Trial, groups, opened
from pipeline.benchmark.measure import (
    NOT_INSTALLED,
    NOT_MEASURED,
    OUT_OF_MEMORY,
    digits,
    interleaved,
    ratio,
    release,
    spread,
)
from pipeline.benchmark.roofline import held
from pipeline.benchmark.subject import BATCHINGS, Subject


def measure(subject: Subject) -> list[dict[str, Any]]:
    """One entry a memory limit: the whole device first."""
    return [_under(subject, cap) for cap in (None, *subject.options.memory_cap_gib)]


def _under(subject: Subject, cap_gib: float | None) -> dict[str, Any]:
    cells: dict[str, Any] = dict.fromkeys(ARMS, NOT_MEASURED)
    for group in groups(subject, chosen(subject.options.arms)):
        if not all(is_installed(arm.system) for arm in group.values()):
            cells |= dict.fromkeys(group, NOT_INSTALLED)
            continue
        with opened(subject, group, cap_gib) as benches:
            cells |= _measured(benches, subject)
    return {
        "cap_gib": cap_gib,
        "memory_gib": digits(subject.memory_bytes(cap_gib) / 2**30),
        "images": len(subject.partitions),
        "equal_batch": min(subject.options.batch_size, len(subject.partitions)),
        "max_new_tokens": subject.options.max_new_tokens,
        "arms": cells,
        "ratios": ratios(cells),
    }


def _measured(benches: Mapping[str, Bench], subject: Subject) -> dict[str, Any]:
    num_images = len(subject.partitions)
    searches = {name: _searched(bench) for name, bench in benches.items()}
    results: dict[str, list[Trial] | str] = {}
    trials: dict[str, Callable[[], Trial]] = {}
    for name, bench in benches.items():
        batches = {"equal": min(subject.options.batch_size, num_images), "own": searches[name].get("best")}
        for batching in subject.options.batchings:
            if _is_hopeless(bench, searches[name], batches[batching]):
                results[f"{name}/{batching}"] = OUT_OF_MEMORY
            else:
                trials[f"{name}/{batching}"] = partial(bench.run, num_images, batches[batching])
    results |= interleaved(trials, subject.options.repeats)
    return {
        name: _cells(
            bench, searches[name], {kind: results.get(f"{name}/{kind}", NOT_MEASURED) for kind in BATCHINGS}
        )
        for name, bench in benches.items()
    }


def _is_hopeless(bench: Bench, searched: Mapping[str, Any], batch: int | None) -> bool:
    """Whether the baseline need not be tried; on a GPU it is, if any batch fits at all."""
    if not searched:
        return False
    return batch is None or (bench.subject.device.type != "cuda" and batch > searched["largest"])


def _cells(bench: Bench, searched: dict[str, Any], results: dict[str, list[Trial] | str]) -> dict[str, Any]:
    """The figures of one arm."""
    some = next((trials for trials in results.values() if isinstance(trials, list)), None)
    if some is None:
        return {"prompt_tokens": NOT_MEASURED, "largest_batch": 0, "searched": {}} | results
    num_images = len(bench.subject.partitions)
    prompt_tokens = statistics.mean(some[0].work.prompt_tokens)
    largest = searched["largest"] if searched else bench.admitted(prompt_tokens)
    batches = {
        "equal": min(bench.subject.options.batch_size, num_images),
        "own": searched["best"] if searched else min(largest, num_images),
    }
    cells = {
        kind: _cell(bench, trials, batches[kind]) if isinstance(trials, list) else trials
        for kind, trials in results.items()
    }
    return {
        "prompt_tokens": digits(prompt_tokens),
        "largest_batch": largest,
        "searched": searched.get("images_per_s", {}),
    } | cells


def _cell(bench: Bench, trials: list[Trial], batch: int) -> dict[str, Any]:
    works = [trial.work for trial in trials]
    num_images = len(works[0].prompt_tokens)
    encode_s = [work.encode_s for work in works if work.encode_s is not None]
    generate_s = [work.total_s - work.encode_s for work in works if work.encode_s is not None]
    # Ours decodes no more together than the memory holds, whatever the batch handed over.
    together = min(batch, max(1, bench.admitted(statistics.mean(works[0].prompt_tokens))))
    least_s = least_seconds(bench.subject, works[0].prompt_tokens, together)
    return {
        "batch": batch,
        "images_per_s": spread([num_images / work.total_s for work in works]),
        "output_tokens_per_s": spread([work.completion_tokens / work.total_s for work in works]),
        "encode_s": spread(encode_s) if encode_s else NOT_MEASURED,
        "generate_s": spread(generate_s) if generate_s else NOT_MEASURED,
        "memory_gib": digits(max(bench.memory_bytes(trial, together) for trial in trials) / 2**30),
        "roofline_share": spread([least_s / work.total_s for work in works]),
    }


def least_seconds(subject: Subject, prompts: tuple[int, ...], batch: int) -> float:
    """The roofline's time for encoding and answering these prompts, decoding ``batch`` of them together."""
    language, ceilings = subject.language, subject.ceilings
    num_partitions = sum(image.grid.num_partitions for image in subject.partitions[: len(prompts)])
    least_s = ceilings.seconds(subject.tower.flops(num_partitions))
    least_s += sum(ceilings.seconds(language.prefill_flops(length)) for length in prompts)
    num_steps = subject.options.max_new_tokens - 1
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        keys = held(part, num_steps)
        least_s += ceilings.seconds(
            language.decode_flops(keys, num_steps * len(part)),
            language.decode_bytes(keys, num_steps, subject.dtype),
        )
    return least_s


def _searched(bench: Bench) -> dict[str, Any]:
    """The fastest batch of the baseline, and the largest that its memory holds; nothing for engines.

    On a CPU nothing runs out of memory in time, so there the largest is what would hold the keys and values.
    """
    if bench.arm.system != "transformers":
        return {}
    on_gpu = bench.subject.device.type == "cuda"
    admitted = 0
    if not on_gpu:
        admitted = bench.admitted(statistics.mean(bench.run(1, 1, max_new_tokens=2).work.prompt_tokens))
    sizes = [size for size in bench.subject.options.baseline_batches if size <= len(bench.subject.partitions)]
    rates: dict[int, float | str] = {}
    for size in sorted(sizes):
        if not on_gpu and size > admitted:
            rates[size] = OUT_OF_MEMORY
            continue
        if not _fits(bench, size):  # which warms up, too
            rates[size] = OUT_OF_MEMORY
            break
        rates[size] = digits(size / bench.run(size, size).work.total_s)
    speeds = {size: rate for size, rate in rates.items() if isinstance(rate, float)}
    if not speeds:
        return {"best": None, "largest": 0, "images_per_s": rates}
    largest = _largest(bench, max(speeds), rates) if on_gpu else admitted
    return {"best": max(speeds, key=speeds.__getitem__), "largest": largest, "images_per_s": rates}


def _largest(bench: Bench, fits: int, rates: Mapping[int, float | str]) -> int:
    """Between the last batch that fitted and the first that did not, if any was met."""
    fails = min((size for size, rate in rates.items() if rate == OUT_OF_MEMORY), default=fits + 1)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _fits(bench, middle) else (fits, middle)
    return fits


def _fits(bench: Bench, batch: int) -> bool:
    try:
        bench.run(batch, batch)
        return True
    except torch.OutOfMemoryError:
        pass
    release()  # only now does no traceback hold the tensors any more
    return False


def ratios(cells: Mapping[str, Any]) -> dict[str, float | str]:
    """How many times the images a second of one arm are those of another, from medians at own batch."""

    def own(arm: str, figure: str) -> Any:
        cell = cells.get(arm)
        best = cell.get("own") if isinstance(cell, dict) else None
        return best.get(figure) if isinstance(best, dict) else None

    found = {
        f"{ARMS[arm].title} against keep-all, whole": ratio(
            own(arm, "images_per_s"), own("keep-all", "images_per_s")
        )
        for arm in ("hired-40", "hired-20", "hired-10")
    }
    found["hired 20 % against keep-all, language model alone"] = ratio(
        own("keep-all", "generate_s"), own("hired-20", "generate_s")
    )
    for ours, theirs in (("keep-all", "transformers"), ("hired-20", "transformers-20"), ("keep-all", "vllm")):
        name = f"{ARMS[ours].title} against {ARMS[theirs].title}"
        found[name] = ratio(own(ours, "images_per_s"), own(theirs, "images_per_s"))
    return found
