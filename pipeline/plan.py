"""What a run will take, from what its stages took on a sample: rows, tokens, rates, hours and their price.

    Measurement + Trial + rows + cluster --make_plan--> Plan --describe--> text
    Plan + Actual --against--> report

The time is ``start-up + loading + rows / rate + ends``. The least that any stage, the cores or the GPUs allow
(see ``pipeline.balance``) is a bound: stages that wait for each other, and share their cores with each other
and with Ray, are slower. A trial of the whole pipeline tells which share of the bound it reaches. ``ends`` is
what passes while the pipeline fills and runs dry: in the trial until its first answers, else what one batch
spends in all stages but the slowest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from pydantic import Field

from hired.errors import ConfigurationError
from pipeline.balance import CPUS, GPUS, Measurement, Pools, balanced, limits, needed, worker_rate
from pipeline.costs import StageCost
from pipeline.resources import Cluster
from pipeline.tally import Record

_RESOURCE = re.compile(r"(\d+(?:\.\d+)?)\s*x?\s*(CPU|GPU)s?", re.IGNORECASE)


class StagePlan(Record):
    """One stage: a worker alone, the pool as it is settled, and as it should be.

    ``worker_rate`` and ``pool_rate`` are rows a second; ``busy`` is the share of the pool's time that the
    plan's rate takes; ``needed`` is how many workers would keep up with it; ``balanced`` how many the cluster
    should run to be fastest. ``row_s`` is wall time a row in one worker, measured between the other two.
    """

    name: str
    on_gpu: bool
    row_s: float
    fastest_s: float
    slowest_s: float
    cpu_s: float
    actors: int
    num_cpus: float
    num_gpus: float
    threads: int
    worker_rate: float
    pool_rate: float
    busy: float
    needed: int
    balanced: int


class Trial(Record):
    """The whole pipeline on rows of the run: so many ``rows`` in ``seconds``, once it was full.

    ``bound`` is what its stages, measured alone, allow there, in rows a second; ``first_rows_s`` is what
    passed from the start of the workers to the first answers.
    """

    rows: float
    seconds: float = Field(gt=0)
    first_rows_s: float
    bound: float = Field(gt=0)

    @property
    def share(self) -> float:
        """Of the bound, which the pipeline reached."""
        return self.rows / self.seconds / self.bound


class Plan(Record):
    """What is expected of a run. ``rate`` is in rows a second once the pipeline is full.

    ``limits`` names what each stage, the CPUs and the GPUs would allow alone; ``bottleneck`` is the lowest,
    and ``share`` how much of it the pipeline reached when it was tried, on ``rows_tried`` rows.
    ``balanced_rate`` is the rate with the balanced pools. Hours of GPUs and CPUs are those of the whole
    cluster from start to end, whether they are busy or not.
    """

    num_cpus: float
    num_gpus: float
    rows: int
    rows_measured: int
    failures: int
    bytes: int
    visual_full: int
    visual_kept: int
    completion_tokens: int
    stages: list[StagePlan]
    limits: dict[str, float]
    bottleneck: str
    rate: float
    balanced_rate: float
    share: float = 1.0
    rows_tried: int = 0
    start_up_s: float
    load_s: float
    ends_s: float
    eta_s: float
    gpu_hours: float
    cpu_hours: float
    gpu_hour_price: float | None = None
    cost: float | None = None
    notes: tuple[str, ...] = ()


def parse_cluster(text: str) -> Cluster:
    """The cluster that ``64 CPU, 8 GPU`` or ``8xGPU,64xCPU`` names: CPUs and, if any, GPUs of all nodes.

    Raises ConfigurationError for anything else.
    """
    found = {kind.upper(): float(number) for number, kind in _RESOURCE.findall(text)}
    rest = _RESOURCE.sub("", text).replace(",", "").replace("+", "").strip()
    if rest or not found.get("CPU") or len(found) != len(_RESOURCE.findall(text)):
        raise ConfigurationError(
            f"--plan-cluster {text!r}: write the CPUs and GPUs of all nodes together, such as '64 CPU, 8 GPU'"
        )
    return Cluster(num_cpus=found["CPU"], num_gpus=found.get("GPU", 0.0))


def make_plan(
    measurement: Measurement,
    rows: int,
    cluster: Cluster,
    *,
    pools: Pools | None = None,
    trial: Trial | None = None,
    start_up_s: float,
    gpu_hour_price: float | None = None,
) -> Plan:
    """The plan of captioning so many rows. ``pools`` None are those that are balanced for this cluster.

    ``start_up_s`` is what passes before workers start: Ray, and the inventory. Without a ``trial`` the rate
    is a bound; the share of it that a trial reached is taken to hold for any pools and cluster. Raises
    ConfigurationError for a cluster without GPUs when the measurement was made on one.
    """
    if not rows >= 0 <= start_up_s:
        raise ValueError(f"rows and start_up_s must not be negative, got {rows} and {start_up_s}")
    best = balanced(measurement, cluster)
    pools = pools or best
    rates = limits(measurement, pools, cluster)
    bottleneck = min(rates, key=rates.__getitem__)
    share = trial.share if trial else 1.0
    rate = share * rates[bottleneck]
    load_s = _load_s(measurement, pools, cluster)
    ends_s = max(0.0, trial.first_rows_s - load_s) if trial else _ends_s(measurement, rows)
    eta_s = start_up_s + ((load_s + rows / rate + ends_s) if rows else 0.0)
    gpu_hours = cluster.num_gpus * eta_s / 3600
    return Plan(
        num_cpus=cluster.num_cpus,
        num_gpus=cluster.num_gpus,
        rows=rows,
        rows_measured=measurement.rows,
        failures=round(measurement.failures * rows),
        bytes=round(measurement.stages["read"].bytes * rows),
        visual_full=round(measurement.visual_full * rows),
        visual_kept=round(measurement.visual_kept * rows),
        completion_tokens=round(measurement.completion_tokens * rows),
        stages=[_stage(name, measurement, pools, best, rate) for name in measurement.stages],
        limits=rates,
        bottleneck=bottleneck,
        rate=rate,
        balanced_rate=share * min(limits(measurement, best, cluster).values()),
        share=share,
        rows_tried=round(trial.rows) if trial else 0,
        start_up_s=start_up_s,
        load_s=load_s,
        ends_s=ends_s,
        eta_s=eta_s,
        gpu_hours=gpu_hours,
        cpu_hours=cluster.num_cpus * eta_s / 3600,
        gpu_hour_price=gpu_hour_price,
        cost=None if gpu_hour_price is None else gpu_hours * gpu_hour_price,
        notes=_notes(measurement, rows, cluster, pools, bottleneck, trial),
    )


def _stage(name: str, measurement: Measurement, pools: Pools, best: Pools, rate: float) -> StagePlan:
    stage, pool = measurement.stages[name], pools[name]
    alone = worker_rate(stage, pool.threads)
    return StagePlan(
        name=name,
        on_gpu=stage.on_gpu,
        row_s=1 / alone,
        fastest_s=stage.fastest_s,
        slowest_s=stage.slowest_s,
        cpu_s=stage.all_cpu_s,
        actors=pool.actors,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        threads=pool.threads,
        worker_rate=alone,
        pool_rate=pool.actors * alone,
        busy=rate / (pool.actors * alone),
        needed=needed(stage, pool.threads, rate),
        balanced=best[name].actors,
    )


def _load_s(measurement: Measurement, pools: Pools, cluster: Cluster) -> float:
    """Until the last worker is ready. Workers load at once; where cores are few, by turns."""
    loads = {name: measurement.import_s + stage.load_s for name, stage in measurement.stages.items()}
    loads.pop("read")
    # The partition pool's own count is left out: its first workers do, and more actors must never cost time.
    return max(max(loads.values()), sum(loads.values()) / cluster.num_cpus)


def _ends_s(measurement: Measurement, rows: int) -> float:
    parts = [min(rows, stage.batch_size) * stage.worker_s for stage in measurement.stages.values()]
    return sum(parts) - max(parts)


def _notes(
    measurement: Measurement, rows: int, cluster: Cluster, pools: Pools, bottleneck: str, trial: Trial | None
) -> tuple[str, ...]:
    notes = []
    if trial is None:
        notes.append("the pipeline as a whole was not tried: the rate is a bound, which it stays below")
    if bottleneck == CPUS:
        busiest = max(measurement.stages, key=lambda name: measurement.stages[name].all_cpu_s)
        share = measurement.stages[busiest].all_cpu_s / measurement.cpu_s
        notes.append(f"all stages together keep every core busy; {busiest} takes {share:.0%} of their time")
    if bottleneck == GPUS:
        notes.append("encode and generate keep the GPUs busy; they are counted as if they never overlapped")
    if cluster.num_gpus and not measurement.on_gpu:
        notes.append("measured on CPUs: the GPUs are not in this estimate")
    for name, stage in measurement.stages.items():
        if not stage.on_gpu and pools[name].threads > stage.threads:
            notes.append(
                f"{name} was measured with {stage.threads} threads and is taken to be "
                f"{pools[name].threads / stage.threads:g} times as fast with {pools[name].threads}"
            )
    if rows and measurement.rows < 32:
        notes.append(f"only {measurement.rows} rows were measured: take it for a guess")
    return tuple(notes)


def describe(plan: Plan) -> str:
    """What ``--plan`` prints."""
    images = max(1, plan.rows)
    kept = plan.visual_kept / plan.visual_full if plan.visual_full else 0.0
    facts = [
        ("rows", f"{plan.rows:,} ({plan.rows_measured:,} measured; {plan.failures:,} likely to fail)"),
        ("images", f"{_size(plan.bytes)} in files, {_size(plan.bytes / images)} each"),
        (
            "visual tokens",
            f"{plan.visual_full:,} before, {plan.visual_kept:,} after ({kept:.1%}); "
            f"{plan.visual_full / images:,.0f} and {plan.visual_kept / images:,.0f} an image",
        ),
        ("output tokens", f"{plan.completion_tokens:,}; {plan.completion_tokens / images:,.1f} an image"),
    ]
    most = [(name, plan.limits[name]) for name in (CPUS, GPUS) if name in plan.limits]
    hours = [
        (
            "rate",
            f"{_number(plan.rate)} images/s, {_reached(plan)}; "
            + ", ".join(f"all {name} allow {_number(rate)}" for name, rate in most),
        ),
        ("balanced", f"{_number(plan.balanced_rate)} images/s with the pools of the last column"),
        (
            "time",
            f"{_time(plan.eta_s)}: start {_time(plan.start_up_s)}, loading {_time(plan.load_s)}, "
            f"rows {_time(plan.rows / plan.rate)}, filling and emptying {_time(plan.ends_s)}",
        ),
        ("GPU-hours" if plan.num_gpus else "CPU-hours", f"{plan.gpu_hours or plan.cpu_hours:,.2f}"),
    ]
    if plan.cost is not None:
        hours.append(("cost", f"{plan.cost:,.2f}, at {plan.gpu_hour_price:,.2f} a GPU-hour"))
    return "\n".join(
        [
            f"Plan for {_cluster(plan)}",
            *_pairs(facts),
            "",
            *_aligned([HEADER, *map(_row, plan.stages)]),
            "",
            *_pairs(hours),
            *(f"  note: {note}" for note in plan.notes),
        ]
    )


HEADER = (
    "stage",
    "ms a row",
    "(from, to)",
    "images/s",
    "workers",
    "each",
    "pool images/s",
    "busy",
    "needed",
    "balanced",
)


def _row(stage: StagePlan) -> tuple[str, ...]:
    each = (
        [f"{stage.num_cpus:g} CPU", f"{stage.num_gpus:g} GPU"]
        if stage.num_gpus
        else [f"{stage.num_cpus:g} CPU"]
    )
    return (
        stage.name,
        _number(stage.row_s * 1e3),
        f"({_number(stage.fastest_s * 1e3)}, {_number(stage.slowest_s * 1e3)})",
        _number(stage.worker_rate),
        str(stage.actors),
        " + ".join(each),
        _number(stage.pool_rate),
        f"{stage.busy:.0%}",
        str(stage.needed),
        str(stage.balanced),
    )


@dataclass(frozen=True, slots=True)
class Actual:
    """What a run took. ``rows`` and ``wall_s`` are those of the session that the plan was made for."""

    rows: int
    wall_s: float
    failures: int
    visual_full: int
    visual_kept: int
    completion_tokens: int
    stages: Mapping[str, StageCost]
    num_gpus: float = 0.0
    first_rows_s: float | None = None  # from the start to the first commit


class Comparison(Record):
    """One line of plan against actual; ``error`` is how far the actual value lies off the planned one."""

    what: str
    unit: str
    planned: float
    actual: float

    @property
    def error(self) -> float | None:
        """Such as 0.1 for ten percent above the plan; None where nothing was planned."""
        return self.actual / self.planned - 1 if self.planned else None


def against(plan: Plan, actual: Actual) -> list[Comparison]:
    """Plan and actual side by side, for the report; totals first, then a row's share of them."""
    planned, done = max(1, plan.rows), max(1, actual.rows)
    pairs = [
        ("rows", "", plan.rows, actual.rows),
        ("time", "s", plan.eta_s, actual.wall_s),
        ("images a second, from start to end", "", plan.rows / plan.eta_s if plan.eta_s else 0.0,
         actual.rows / actual.wall_s if actual.wall_s else 0.0),
        ("failures a thousand rows", "", 1e3 * plan.failures / planned, 1e3 * actual.failures / done),
        ("visual tokens an image, before", "", plan.visual_full / planned, actual.visual_full / done),
        ("visual tokens an image, after", "", plan.visual_kept / planned, actual.visual_kept / done),
        ("output tokens an image", "", plan.completion_tokens / planned, actual.completion_tokens / done),
    ]  # fmt: skip
    if plan.num_gpus:
        pairs.append(("GPU-hours", "h", plan.gpu_hours, actual.num_gpus * actual.wall_s / 3600))
    if actual.first_rows_s is not None:
        pairs.append(
            ("until the first rows", "s", plan.start_up_s + plan.load_s + plan.ends_s, actual.first_rows_s)
        )
    for stage in plan.stages:
        cost = actual.stages.get(stage.name)
        if cost and cost.rows:
            pairs.append((f"{stage.name}, a row", "ms", 1e3 * stage.row_s, 1e3 * cost.busy_s / cost.rows))
    return [Comparison(what=what, unit=unit, planned=one, actual=other) for what, unit, one, other in pairs]


def _bound(plan: Plan) -> str:
    return f"all {plan.bottleneck} together" if plan.bottleneck in (CPUS, GPUS) else plan.bottleneck


def _reached(plan: Plan) -> str:
    if not plan.rows_tried:
        return f"bounded by {_bound(plan)}"
    return f"{plan.share:.0%} of what {_bound(plan)} would allow alone, as tried on {plan.rows_tried:,} rows"


def _cluster(plan: Plan) -> str:
    parts = [f"{plan.num_cpus:g} CPUs"] + ([f"{plan.num_gpus:g} GPUs"] if plan.num_gpus else [])
    return ", ".join(parts)


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {name:<14}  {text}" for name, text in pairs]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    """Three digits, however large."""
    if not math.isfinite(value):
        return "no limit"
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
