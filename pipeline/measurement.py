"""What the stages take on a sample, measured: the real stage classes, one after the other, in this process.

    batches of rows with image bytes --PartitionStage--EncodeStage--GenerateStage--> Measurement

A stage's first call warms up and is left out, unless it alone takes all the time there is. Seconds are whole
rounds through the sample divided by its rows, and of several rounds the median: a median of calls would leave
out the few large images that take most of the time.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from ray.data.block import BlockAccessor

from hired.errors import ConfigurationError
from pipeline.balance import Measurement, StageMeasurement
from pipeline.cluster import python_path
from pipeline.columns import Batch
from pipeline.config import Config, Pool
from pipeline.costs import SECONDS

log = logging.getLogger(__name__)

# Rounds through the sample: three say how much the seconds vary, more say little else.
MAX_ROUNDS = 3
# The clock's own grain: no stage takes nothing.
MIN_SECONDS = 1e-7

Stage = Callable[[Batch], Batch]


class StageClass(Protocol):
    """A stage as the pipeline makes it."""

    @property
    def name(self) -> str:
        """Its own."""
        ...

    def __call__(self, config: Config, /) -> Stage:
        """A worker's copy."""
        ...


def measure(
    config: Config,
    batches: Sequence[Batch],
    *,
    seconds: float | None = None,
    stages: Sequence[StageClass] | None = None,
) -> Measurement:
    """What the stages take for these rows, as ReadStage makes them, under a settled configuration.

    Each stage gets ``seconds`` (``config.plan_seconds``), and a call that has begun is ended. The rows'
    pixels and tokens are held meanwhile, about 1.5 MB a row. On a cluster run it as a task that holds a whole
    GPU and ends its process: that would keep memory of the models' device otherwise.
    Raises ConfigurationError when no row of the sample can be read.
    """
    limit_s = config.plan_seconds if seconds is None else seconds
    rows = _joined(batches)
    if not rows or all(rows["error_type"]):
        raise ConfigurationError(
            "no image of the sample can be read, so nothing can be measured: "
            + (str(rows["error"][0]) if rows else "the input has no rows")
        )
    num_rows = len(rows["key"])
    measured = {"read": _reading(rows)}
    with _threads_restored():
        for stage in _stages() if stages is None else stages:
            pool: Pool = getattr(config, stage.name)
            log.info("measuring %s on %d rows", stage.name, len(rows["key"]))
            measured[stage.name], rows = _measured(stage, config, pool, rows, limit_s)
    return Measurement(
        rows=num_rows,
        stages=measured,
        import_s=_import_s() if stages is None else 0.0,
        **_outcomes(rows, measured["generate"].rows),
    )


def _stages() -> list[StageClass]:
    # Here, so that whoever reads a plan need not load torch and transformers.
    from pipeline.stages import EncodeStage, GenerateStage, PartitionStage

    return [PartitionStage, EncodeStage, GenerateStage]


def _reading(rows: Batch) -> StageMeasurement:
    """By what ReadStage noted in its rows. Readers wait for disks and networks, and take hardly any CPU."""
    costs = rows["read" + SECONDS] if "read" + SECONDS in rows else np.full(len(rows["key"]), MIN_SECONDS)
    a_row = max(MIN_SECONDS, float(np.mean(costs)))
    return StageMeasurement(
        rows=len(costs),
        calls=1,
        seconds=a_row,
        fastest_s=a_row,
        slowest_s=a_row,
        cpu_s=0.0,
        bytes=float(np.mean([len(image) for image in rows["image"]])),
        batch_size=len(costs),
    )


def _measured(
    stage: StageClass, config: Config, pool: Pool, rows: Batch, limit_s: float
) -> tuple[StageMeasurement, Batch]:
    """A stage's costs, and its rows for the next one."""
    on_gpu = config.device == "cuda" and stage.name != "partition"
    concurrent = config.generate.concurrent_calls if stage.name == "generate" else 1
    size = pool.batch_size or len(rows["key"])
    inputs = _batches(rows, size, full=stage.name == "generate")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started_s = time.perf_counter()
    worker = stage(config)
    load_s = time.perf_counter() - started_s
    calls = _Calls(worker, inputs, concurrent, limit_s)
    calls.run()
    outputs = [output for output in calls.outputs if output is not None]
    memory = torch.cuda.max_memory_reserved() / _gpu_bytes() if on_gpu else 0.0
    del worker, calls.worker
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    a_row = calls.seconds_a_row()
    handoff_s, num_bytes = _handed_over(outputs)
    return StageMeasurement(
        rows=sum(
            _rows(batch) for batch, output in zip(inputs, calls.outputs, strict=True) if output is not None
        ),
        calls=len(calls.costs),
        seconds=max(MIN_SECONDS, a_row.median),
        fastest_s=a_row.fastest,
        slowest_s=a_row.slowest,
        # A stage on CPUs works while it is called, be it in a process of its own that this one waits for.
        cpu_s=a_row.cpu if on_gpu else max(a_row.cpu, a_row.median),
        handoff_s=handoff_s,
        bytes=num_bytes,
        batch_size=size,
        threads=pool.threads or 1,
        num_cpus=pool.num_cpus or 0.0,
        num_gpus=pool.num_gpus or 0.0,
        on_gpu=on_gpu,
        gpu_memory_share=min(1.0, memory),
        load_s=load_s,
    ), _joined(outputs)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a call took: wall seconds since the call before ended, CPU seconds, and its rows."""

    seconds: float
    cpu_s: float
    rows: int


@dataclass(frozen=True, slots=True)
class _ARow:
    """Seconds a row."""

    median: float
    fastest: float
    slowest: float
    cpu: float


class _Calls:
    """A worker called over and over with the batches of a sample, so many calls at once."""

    def __init__(self, worker: Stage, inputs: Sequence[Batch], concurrent: int, limit_s: float) -> None:
        self.worker = worker
        self.costs: list[_Cost] = []
        self.outputs: list[Batch | None] = [None] * len(inputs)
        self._inputs, self._concurrent, self._limit_s = inputs, concurrent, limit_s

    def run(self) -> None:
        """Warms up, then goes round until the time is over; outputs are kept of whatever was done once."""
        ends_s = time.perf_counter() + self._limit_s
        warm_up = self._timed(0)
        if time.perf_counter() >= ends_s:
            self.costs.append(warm_up)
            return
        if self._concurrent == 1:
            for index in self._order():
                self.costs.append(self._timed(index))
                if time.perf_counter() >= ends_s:
                    return
        else:
            self._run_together(ends_s)

    def _order(self) -> Iterator[int]:
        """Round after round, to a whole number of calls at once."""
        count = len(self._inputs) * MAX_ROUNDS
        return islice(cycle(range(len(self._inputs))), -(-count // self._concurrent) * self._concurrent)

    def _timed(self, index: int) -> _Cost:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        self._call(index)
        return self._cost(index, wall_s, cpu_s)

    def _call(self, index: int) -> int:
        output = self.worker(self._inputs[index])
        if self.outputs[index] is None:
            self.outputs[index] = output
        return index

    def _cost(self, index: int, wall_s: float, cpu_s: float) -> _Cost:
        return _Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s, _rows(self._inputs[index]))

    def _run_together(self, ends_s: float) -> None:
        """Calls that overlap: each is charged from the end of the one before to its own."""
        order, running = self._order(), set[Future[int]]()
        with ThreadPoolExecutor(self._concurrent) as threads:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            running = {threads.submit(self._call, index) for index in islice(order, self._concurrent)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    self.costs.append(self._cost(future.result(), wall_s, cpu_s))
                    wall_s, cpu_s = time.perf_counter(), time.process_time()
                if time.perf_counter() < ends_s:
                    running |= {threads.submit(self._call, index) for index in islice(order, len(ended))}

    def seconds_a_row(self) -> _ARow:
        """The median of whole rounds; of all calls together where there was no whole round."""
        # Calls that run at once end at once: only together do their seconds say anything.
        size = math.lcm(len(self._inputs), self._concurrent)
        rounds = [self.costs[start : start + size] for start in range(0, len(self.costs) - size + 1, size)]
        rounds = rounds or [self.costs]
        of_rounds = [_mean(costs) for costs in rounds]
        parts = of_rounds if len(of_rounds) > 1 else [_mean(part) for part in self._parts()]
        cpu = [sum(cost.cpu_s for cost in costs) / sum(cost.rows for cost in costs) for costs in rounds]
        return _ARow(statistics.median(of_rounds), min(parts), max(parts), statistics.median(cpu))

    def _parts(self) -> list[list[_Cost]]:
        size = self._concurrent
        return [self.costs[start : start + size] for start in range(0, len(self.costs), size)]


def _mean(costs: Sequence[_Cost]) -> float:
    return sum(cost.seconds for cost in costs) / sum(cost.rows for cost in costs)


def _joined(batches: Sequence[Batch]) -> Batch:
    if not batches:
        return {}
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _batches(rows: Batch, size: int, *, full: bool) -> list[Batch]:
    """The rows by so many; ``full`` ones begin again with the first row where the last are too few."""
    count = len(rows["key"])
    order = np.arange(-(-count // size) * size) % count if full else np.arange(count)
    return [
        {name: column[order[start : start + size]] for name, column in rows.items()}
        for start in range(0, len(order), size)
    ]


def _rows(batch: Mapping[str, Any]) -> int:
    return len(batch["key"])


def _handed_over(outputs: Sequence[Batch]) -> tuple[float, float]:
    """Seconds and bytes a row to make Arrow of a stage's rows, as Ray does, and to copy and read it again."""
    costs, num_bytes, num_rows = [], 0, 0
    for output in islice(outputs, 8):
        started_s = time.perf_counter()
        table = BlockAccessor.batch_to_block(output)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        data = sink.getvalue()
        BlockAccessor.for_block(pa.ipc.open_stream(data).read_all()).to_batch_format("numpy")
        costs.append((time.perf_counter() - started_s) / _rows(output))
        num_bytes, num_rows = num_bytes + data.size, num_rows + _rows(output)
    # The first conversion loads Ray's own modules.
    return statistics.median(costs[1:] or costs), num_bytes / num_rows


def _outcomes(answers: Batch, num_rows: int) -> dict[str, float]:
    """Tokens a row and the share of failures. A row's answers share its visual tokens."""
    return {
        "visual_full": float(answers["visual_tokens_full"].mean()),
        "visual_kept": float(answers["visual_tokens_kept"].mean()),
        "completion_tokens": float(answers["completion_tokens"].sum()) / num_rows,
        "failures": float(np.mean([bool(kind) for kind in answers["error_type"]])),
    }


def _import_s() -> float:
    """What a new worker takes to import the stages, by one that is started for it."""
    started_s = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import pipeline.stages"],
        env={**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - started_s


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Stages give their process their own number of threads; this one goes on with its own."""
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = variable
