"""The section ``stages``: each stage alone, the whole pipeline in this process, and what the hardware allows.

Prefill is generation of one token, for prompts that the KV cache holds at once. Decoding is what follows when
each of them has its first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from hired.errors import CapacityError
from hired.partitioning import partition
from hired.types import VisualTokens
from pipeline.benchmark.arms import Arm, EngineSystem, chosen, parts
from pipeline.benchmark.bench import Bench, opened
from pipeline.benchmark.measure import NOT_MEASURED, OUT_OF_MEMORY, interleaved, now, ratio, spread
from pipeline.benchmark.subject import Subject

STAGES = ("encode", "prefill", "decode", "generate", "whole")
RATES = (
    "encode_images_per_s",
    "prefill_images_per_s",
    "decode_tokens_per_s",
    "generate_images_per_s",
    "whole_images_per_s",
)


def measure(subject: Subject) -> dict[str, Any]:
    """Partitioning on one core, and the rest by arm."""
    arms = {name: arm for name, arm in chosen(subject.options.arms).items() if arm.system == "engine"}
    cells: dict[str, Any] = {}
    if arms:
        with opened(subject, arms, None) as benches:
            cells = _measured(subject, benches)
    return {
        "images": len(subject.partitions),
        "threads": subject.options.threads,
        "partition_images_per_s_per_core": spread(_partition_rates(subject)),
        "arms": cells,
        "hired 20 % against keep-all, from bytes to captions": ratio(
            _whole(cells.get("hired-20")), _whole(cells.get("keep-all"))
        ),
    }


def _whole(cell: Any) -> Any:
    return cell["whole_images_per_s"] if isinstance(cell, dict) else None


def _partition_rates(subject: Subject) -> list[float]:
    rates = []
    for _ in range(subject.options.repeats + 1):
        start = now(subject.device)
        for file in subject.files:
            partition(file, subject.tiling)
        rates.append(len(subject.files) / (now(subject.device) - start))
    return rates[1:]


def _measured(subject: Subject, benches: dict[str, Bench]) -> dict[str, Any]:
    num_new = subject.options.max_new_tokens
    trials: dict[str, Callable[[], Any]] = {}
    prompts: dict[str, tuple[int, ...]] = {}
    for name, bench in benches.items():
        system = bench.system
        assert isinstance(system, EngineSystem)
        rows = range(len(subject.files))
        tokens, prompts[name] = _at_once(bench, system.encode(bench.arm, rows))
        if tokens:
            work: dict[str, tuple[Any, ...]] = {
                "encode": (system.encode, bench.arm, rows),
                "prefill": (system.generate, tokens, 1),
                "generate": (system.generate, tokens, num_new),
                "whole": (bare_loop, subject, system, bench.arm, subject.files),
            }
            trials[f"{name}/decode"] = partial(_decoding, subject, system, tokens, prompts[name])
            trials |= {f"{name}/{stage}": partial(_seconds, subject, *call) for stage, call in work.items()}
    results = interleaved(trials, subject.options.repeats)
    return {
        name: _cells(
            subject, prompts[name], {stage: results.get(f"{name}/{stage}", OUT_OF_MEMORY) for stage in STAGES}
        )
        for name in benches
    }


def _at_once(bench: Bench, tokens: list[VisualTokens]) -> tuple[list[VisualTokens], tuple[int, ...]]:
    """The images whose prompts the KV cache holds together, and their lengths; none if not even one."""
    assert isinstance(bench.system, EngineSystem)
    try:
        [longest], _ = bench.system.generate([max(tokens, key=len)], 1)
    except CapacityError:
        return [], ()
    some = tokens[: bench.admitted(longest)]
    return some, tuple(bench.system.generate(some, 1)[0])


@dataclass(frozen=True, slots=True)
class Decoding:
    """Passes of one token a sequence: how long, how many, and the keys that their tokens saw."""

    seconds: float
    num_tokens: int
    num_steps: int
    held: int


def _decoding(
    subject: Subject, system: EngineSystem, tokens: Sequence[VisualTokens], prompts: tuple[int, ...]
) -> Decoding:
    """What comes after the moment when every prompt has its first token."""
    told, late = [0] * len(tokens), [0] * len(tokens)
    begun_by: set[int] = set()
    keys, begun_s = 0, time.perf_counter()
    questions = [subject.options.prompt] * len(tokens)
    for piece in system.generator.stream(tokens, questions, max_new_tokens=subject.options.max_new_tokens):
        if isinstance(piece.caption, Exception):
            raise piece.caption
        if len(begun_by) == len(tokens) and piece.token_id is not None:
            late[piece.index] += 1
            keys += prompts[piece.index] + told[piece.index]
        told[piece.index] += piece.token_id is not None
        if piece.index not in begun_by:
            begun_by.add(piece.index)
            begun_s = time.perf_counter()
    return Decoding(time.perf_counter() - begun_s, sum(late), max(late), keys)


def _cells(subject: Subject, prompts: tuple[int, ...], results: dict[str, list[Any] | str]) -> dict[str, Any]:
    """Rates of one arm, and which share of the measured ceilings they are."""
    found = {stage: trials for stage, trials in results.items() if not isinstance(trials, str)}
    if len(found) < len(STAGES):
        return dict.fromkeys(RATES, OUT_OF_MEMORY)
    ceilings, language = subject.ceilings, subject.language
    num_images = len(subject.files)
    num_partitions = sum(image.grid.num_partitions for image in subject.partitions)
    least_encode_s = ceilings.seconds(subject.tower.flops(num_partitions))
    least_prefill_s = sum(ceilings.seconds(language.prefill_flops(length)) for length in prompts)
    return {
        "prompts_at_once": len(prompts),
        "encode_images_per_s": spread([num_images / s for s in found["encode"]]),
        "encode_roofline_share": spread([least_encode_s / s for s in found["encode"]]),
        "prefill_images_per_s": spread([len(prompts) / s for s in found["prefill"]]),
        "prefill_roofline_share": spread([least_prefill_s / s for s in found["prefill"]]),
        "decode_tokens_per_s": _decode_spread(lambda trial: trial.num_tokens, found["decode"]),
        "decode_roofline_share": _decode_spread(
            lambda trial: ceilings.seconds(
                language.decode_flops(trial.held, trial.num_tokens),
                language.decode_bytes(trial.held, trial.num_steps, subject.dtype),
            ),
            found["decode"],
        ),
        "generate_images_per_s": spread([len(prompts) / s for s in found["generate"]]),
        "whole_images_per_s": spread([num_images / s for s in found["whole"]]),
    }


def _decode_spread(figure: Callable[[Decoding], float], trials: Sequence[Decoding]) -> Any:
    """A figure a second; not measured where every answer ended before the last one began."""
    if not all(trial.num_tokens for trial in trials):
        return NOT_MEASURED
    return spread([figure(trial) / trial.seconds for trial in trials])


def _seconds(subject: Subject, work: Callable[..., object], *arguments: object) -> float:
    start = now(subject.device)
    work(*arguments)
    return now(subject.device) - start


def bare_loop(
    subject: Subject, system: EngineSystem, arm: Arm, files: Sequence[bytes], batch: int | None = None
) -> int:
    """Bytes to captions, ``batch`` images at a time, on all threads of the run; how many tokens came."""
    num_new = 0
    with ThreadPoolExecutor(subject.options.threads) as threads:
        for part in parts(range(len(files)), batch):
            images = list(
                threads.map(partial(partition, tiling=subject.tiling), (files[row] for row in part))
            )
            tokens: list[VisualTokens] = system.encoder.encode(images, budget=arm.budget, policy=arm.policy)
            num_new += system.generate(tokens, subject.options.max_new_tokens)[1]
    return num_new
