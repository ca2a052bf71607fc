"""What a run tells Prometheus while it works, through Ray's own exporter; one table says all of it.

``python -m pipeline.metrics`` prints the documentation, ``--grafana`` the dashboard. Without a Ray that is
initialised every call does nothing, so that stages can be used anywhere. Labels have few values: a stage, an
outcome, an error's class; never a key.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util import metrics as ray_metrics

from pipeline.progress import UnitTotals

# Ray's exporter puts this before every name.
PREFIX = "ray_"
# Class names are few, unless some library makes them up.
MAX_ERROR_TYPES = 100
OTHER = "other"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its labels, and what it counts and where."""

    name: str
    kind: Kind
    meaning: str
    told_by: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of the dashboard: expressions with their legends, and the unit in Grafana's words."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


STAGE_BOUNDARIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
COMMIT_BOUNDARIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

METRICS = (
    Metric("hired_rows_total", "counter", "answers committed; `outcome` is `caption` or `dead_letter`",
           "driver", ("outcome",)),
    Metric("hired_failures_total", "counter", "dead letters committed, by the stage that gave up and the "
           "class of its error", "driver", ("stage", "error_type")),
    Metric("hired_stage_seconds", "histogram", "seconds of one call of a stage, a batch of rows", "workers",
           ("stage",), STAGE_BOUNDARIES),
    Metric("hired_stage_rows_total", "counter", "rows that a stage was called with", "workers", ("stage",)),
    Metric("hired_visual_tokens_total", "counter", "visual tokens of committed captions; `kind` is `full` "
           "(before dropping) or `kept` (after)", "driver", ("kind",)),
    Metric("hired_output_tokens_total", "counter", "tokens generated for committed captions", "driver"),
    Metric("hired_in_flight_rows", "gauge", "rows handed to the pipeline and not committed yet", "driver"),
    Metric("hired_unit_commit_seconds", "histogram", "seconds to write one unit so that it survives a kill",
           "driver", (), COMMIT_BOUNDARIES),
    Metric("hired_worker_deaths_total", "counter", "workers that died or were ended in the middle of a batch",
           "driver", ("stage",)),
    Metric("hired_running_sequences", "gauge", "sequences that an engine decodes together, a worker",
           "generate workers", ("worker",)),
    Metric("hired_waiting_sequences", "gauge", "prompts that wait for room in the key-value cache, a worker",
           "generate workers", ("worker",)),
    Metric("hired_kv_cache_tokens", "gauge", "places of the key-value cache; `state` is `held` or `free`",
           "generate workers", ("worker", "state")),
)  # fmt: skip

PANELS = (
    Panel("Answers", "ops", (
        ("sum by (outcome) (rate(ray_hired_rows_total[$__rate_interval]))", "{{outcome}}"),
    )),
    Panel("Rows in flight", "short", (("sum(ray_hired_in_flight_rows)", "rows"),)),
    Panel("Failures", "ops", (
        ("sum by (stage, error_type) (rate(ray_hired_failures_total[$__rate_interval]))",
         "{{stage}}: {{error_type}}"),
    )),
    Panel("Worker deaths", "short", (
        ("sum by (stage) (increase(ray_hired_worker_deaths_total[$__rate_interval]))", "{{stage}}"),
    )),
    Panel("Rows through each stage", "ops", (
        ("sum by (stage) (rate(ray_hired_stage_rows_total[$__rate_interval]))", "{{stage}}"),
    )),
    Panel("Workers busy in each stage", "short", (
        ("sum by (stage) (rate(ray_hired_stage_seconds_sum[$__rate_interval]))", "{{stage}}"),
    )),
    Panel("Seconds a batch, 95th percentile", "s", (
        ("histogram_quantile(0.95, sum by (stage, le) "
         "(rate(ray_hired_stage_seconds_bucket[$__rate_interval])))", "{{stage}}"),
    )),
    Panel("Seconds to commit a unit, 95th percentile", "s", (
        ("histogram_quantile(0.95, sum by (le) "
         "(rate(ray_hired_unit_commit_seconds_bucket[$__rate_interval])))", "commit"),
    )),
    Panel("Visual tokens", "ops", (
        ("sum by (kind) (rate(ray_hired_visual_tokens_total[$__rate_interval]))", "{{kind}}"),
    )),
    Panel("Share of visual tokens kept", "percentunit", (
        ('sum(ray_hired_visual_tokens_total{kind="kept"}) / sum(ray_hired_visual_tokens_total{kind="full"})',
         "kept"),
    )),
    Panel("Output tokens", "ops", (
        ("sum(rate(ray_hired_output_tokens_total[$__rate_interval]))", "tokens"),
    )),
    Panel("Sequences in the engines", "short", (
        ("sum(ray_hired_running_sequences)", "running"),
        ("sum(ray_hired_waiting_sequences)", "waiting"),
    )),
    Panel("Key-value cache", "percentunit", (
        ('sum by (worker) (ray_hired_kv_cache_tokens{state="held"}) / sum by (worker) '
         "(ray_hired_kv_cache_tokens)", "{{worker}}"),
    )),
)  # fmt: skip

_made: dict[str, Any] = {}
_error_types: set[str] = set()


def committed(unit: UnitTotals, seconds: float) -> None:
    """Counts a unit that was committed in so many seconds."""
    _add("hired_rows_total", unit.captions, outcome="caption")
    _add("hired_rows_total", sum(unit.failures.values()), outcome="dead_letter")
    for kind, count in unit.failures.items():
        stage, _, error_type = kind.partition(": ")
        _add("hired_failures_total", count, stage=stage, error_type=_bounded(error_type))
    _add("hired_visual_tokens_total", unit.visual_full, kind="full")
    _add("hired_visual_tokens_total", unit.visual_kept, kind="kept")
    _add("hired_output_tokens_total", unit.completion_tokens)
    _observe("hired_unit_commit_seconds", seconds)


def called(stage: str, rows: int, seconds: float) -> None:
    """Counts a call of a stage, in the worker that made it."""
    _observe("hired_stage_seconds", seconds, stage=stage)
    _add("hired_stage_rows_total", rows, stage=stage)


def in_flight(rows: int) -> None:
    """Sets how many rows the driver waits for."""
    _set("hired_in_flight_rows", rows)


def worker_died(stage: str) -> None:
    """Counts a worker that died while rows were in it."""
    _add("hired_worker_deaths_total", 1, stage=stage)


def engine(*, running: int, waiting: int, places_free: int, places: int) -> None:
    """Sets what the engine of this worker holds, as ``ContinuousEngine.counts`` says it."""
    worker = _worker()
    _set("hired_running_sequences", running, worker=worker)
    _set("hired_waiting_sequences", waiting, worker=worker)
    _set("hired_kv_cache_tokens", places - places_free, worker=worker, state="held")
    _set("hired_kv_cache_tokens", places_free, worker=worker, state="free")


def _add(name: str, value: float, **labels: str) -> None:
    if value > 0 and (metric := _metric(name)) is not None:
        metric.inc(value, tags=labels)


def _set(name: str, value: float, **labels: str) -> None:
    if (metric := _metric(name)) is not None:
        metric.set(value, tags=labels)


def _observe(name: str, value: float, **labels: str) -> None:
    if (metric := _metric(name)) is not None:
        metric.observe(value, tags=labels)


def _metric(name: str) -> Any:
    """Ray's metric, made at its first use; None where no Ray runs."""
    if not ray.is_initialized():
        return None
    if name not in _made:
        metric = next(metric for metric in METRICS if metric.name == name)
        options: dict[str, Any] = {"description": metric.meaning, "tag_keys": metric.labels}
        if metric.kind == "histogram":
            _made[name] = ray_metrics.Histogram(name, boundaries=list(metric.boundaries), **options)
        else:
            made = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
            _made[name] = made(name, **options)
    return _made[name]


def _bounded(error_type: str) -> str:
    """The class's name; ``other`` for what is none, and once there are too many."""
    known = error_type in _error_types
    if not known and (len(_error_types) >= MAX_ERROR_TYPES or not error_type.isidentifier()):
        return OTHER
    _error_types.add(error_type)
    return error_type


def _worker() -> str:
    """This actor's id: as many values as there are generate workers."""
    if not ray.is_initialized():
        return "driver"  # asking for the context would start Ray
    with suppress(Exception):  # the driver, or a task, is no actor
        if actor := ray.get_runtime_context().get_actor_id():
            return str(actor)[:8]
    return "driver"


PAGE = """# Metrics

A run exports these through Ray, on every node's metrics port, beside Ray's own. Prometheus sees each name
with `ray_` before it, and Ray adds labels for the node and the session. `ray metrics launch-prometheus`
starts a Prometheus that finds them, and `docs/grafana.json` is a dashboard to import into Grafana.

Counters begin at zero with each session of a run; dashboards take their rates. Labels have few values: stages
are `read`, `partition`, `encode`, `generate`; an `error_type` is the name of an error's class (`other` from
the 101st on); a `worker` is the start of an actor's id. `make docs` writes this page, from
`pipeline/metrics.py`.

| name | kind | labels | what it says | told by |
|---|---|---|---|---|
"""


def reference() -> str:
    """The documentation of every metric, a page of Markdown."""
    return PAGE + "\n".join(map(_line, METRICS))


def _line(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} | {metric.told_by} |"


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks Prometheus for, without what histograms add to their names."""
    found = re.findall(rf"\b{PREFIX}(\w+)", expression)
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    bases = {name: re.sub("_(bucket|sum|count)$", "", name) for name in found}
    return {bases[name] if bases[name] in histograms else name for name in found}


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard: two panels a row, over whatever Prometheus it is imported beside."""
    return {
        "title": "HiRED captioning",
        "uid": "hired-captioning",
        "tags": ["ray", "hired"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
            ]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel) -> Mapping[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2) if "--grafana" in sys.argv[1:] else reference())
