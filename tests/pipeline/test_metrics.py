"""The metrics' documentation and dashboard are what the code says, and labels stay few."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline import metrics
from pipeline.metrics import METRICS, PANELS, dashboard, names_in, reference
from pipeline.progress import UnitTotals

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = {metric.name for metric in METRICS}
# Those that only an endpoint tells.
ENDPOINT = {metric.name for metric in METRICS if metric.told_by in ("ingress", "encode workers")}
UNIT = UnitTotals(
    rows=10,
    captions=7,
    failures={"read: OSError": 2, "encode: Odd Name!": 1},
    visual_full=700,
    visual_kept=140,
    completion_tokens=70,
)


class Recorder:
    """Stands for Ray's metrics: keeps what it is told, and refuses labels that were not declared."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, str], float]] = []
        self.is_initialized = lambda: True
        self.Counter = self.Gauge = self.Histogram = self._made

    def _made(self, name: str, **options: Any) -> Any:
        recorder = self

        class Made:
            def _tell(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(options["tag_keys"])
                assert all(isinstance(tag, str) for tag in tags.values())
                recorder.told.append((name, tags, value))

            inc = set = observe = _tell

        return Made()

    def total(self, name: str, **labels: str) -> float:
        return sum(
            value for told, tags, value in self.told if told == name and labels.items() <= tags.items()
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    told = Recorder()
    monkeypatch.setattr(metrics, "ray_metrics", told)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "_made", {})
    monkeypatch.setattr(metrics, "_error_types", set())
    monkeypatch.setattr(metrics, "worker", lambda: "abcdef01")
    return told


def test_the_documentation_and_the_dashboard_are_what_the_code_prints() -> None:
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == reference() + "\n", "run make docs"
    assert json.loads((DOCS / "grafana.json").read_text(encoding="utf-8")) == dashboard(), "run make docs"


def test_every_panel_asks_for_metrics_that_exist_and_every_metric_has_a_panel() -> None:
    asked = set()
    for panel in PANELS:
        for expression, _ in panel.queries:
            assert names_in(expression), expression
            assert names_in(expression) <= NAMES, expression
            asked |= names_in(expression)
    assert asked == NAMES


def test_panels_ask_by_labels_that_the_metrics_have() -> None:
    for panel in PANELS:
        for expression, legend in panel.queries:
            labels = {
                label for metric in METRICS if metric.name in names_in(expression) for label in metric.labels
            }
            shown = {part.split("}}")[0] for part in legend.split("{{")[1:]}
            assert shown <= labels, expression


def test_names_follow_prometheus_habits() -> None:
    for metric in METRICS:
        assert metric.name.startswith("hired_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.boundaries) == (metric.kind == "histogram")
    assert len(NAMES) == len(METRICS)


def test_panels_do_not_overlap() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(PANELS)


def test_without_ray_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_made", {})
    metrics.committed(UNIT, 0.1)
    metrics.called("encode", 8, 0.5)
    metrics.in_flight(3)
    metrics.worker_died("encode")
    metrics.engine(running=1, waiting=0, places_free=5, places=10)
    assert metrics._made == {}


def test_a_committed_unit_is_counted_by_outcome_and_kind(recorder: Recorder) -> None:
    metrics.committed(UNIT, 0.25)
    assert recorder.total("hired_rows_total", outcome="caption") == 7
    assert recorder.total("hired_rows_total", outcome="dead_letter") == 3
    assert recorder.total("hired_failures_total", stage="read", error_type="OSError") == 2
    assert recorder.total("hired_visual_tokens_total", kind="full") == 700
    assert recorder.total("hired_visual_tokens_total", kind="kept") == 140
    assert recorder.total("hired_output_tokens_total") == 70
    assert recorder.total("hired_unit_commit_seconds") == 0.25


def test_every_metric_can_be_told(recorder: Recorder) -> None:
    metrics.committed(UNIT, 0.25)
    metrics.called("generate", 32, 12.5)
    metrics.in_flight(3)
    metrics.worker_died("encode")
    metrics.engine(running=4, waiting=2, places_free=300, places=1000)
    for name in ENDPOINT:
        [labels] = [metric.labels for metric in METRICS if metric.name == name]
        metrics.tell(name, 1, **dict.fromkeys(labels, "a"))
    assert {name for name, _, _ in recorder.told} == NAMES
    assert recorder.total("hired_kv_cache_tokens", state="held") == 700


def test_counters_are_not_told_of_nothing(recorder: Recorder) -> None:
    """Ray refuses to add zero."""
    metrics.committed(UnitTotals(0, 0, {}, 0, 0, 0), 0.1)
    assert {name for name, _, _ in recorder.told} == {"hired_unit_commit_seconds"}


def test_error_types_stay_few_whatever_libraries_raise(recorder: Recorder) -> None:
    kinds = {f"read: Error{number}": 1 for number in range(metrics.MAX_ERROR_TYPES + 50)}
    metrics.committed(UnitTotals(200, 0, {"read: s3://bucket/key": 5, **kinds}, 0, 0, 0), 0.1)
    seen = {tags["error_type"] for name, tags, _ in recorder.told if name == "hired_failures_total"}
    assert len(seen) == metrics.MAX_ERROR_TYPES + 1
    assert recorder.total("hired_failures_total", error_type="other") == 55
    assert recorder.total("hired_failures_total") == len(kinds) + 5


TOLD = """
import time, urllib.request
import ray
from pipeline import metrics
from pipeline.progress import UnitTotals

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)

@ray.remote
class Worker:
    def call(self):
        metrics.called("encode", 8, 0.5)
        metrics.engine(running=4, waiting=0, places_free=300, places=1000)

worker = Worker.remote()
ray.get(worker.call.remote())
metrics.committed(UnitTotals(3, 2, {"read: OSError": 1}, 200, 40, 20), 0.2)
metrics.in_flight(5)
metrics.worker_died("generate")
for metric in metrics.METRICS:
    if metric.told_by in ("ingress", "encode workers"):  # an endpoint's
        metrics.tell(metric.name, 1, **dict.fromkeys(metric.labels, "a"))
port = ray.nodes()[0]["MetricsExportPort"]
deadline = time.monotonic() + 60
text = ""
while time.monotonic() < deadline and not ("hired_stage_rows" in text and "hired_requests_total" in text):
    time.sleep(1)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
print("\\n".join(line for line in text.splitlines() if "hired_" in line))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_exports_them_by_the_names_that_the_dashboard_asks_for() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TOLD],
        env={**os.environ, "PYTHONPATH": str(DOCS.parent)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    samples = {line.split("{")[0] for line in ended.stdout.splitlines() if line.startswith("ray_")}
    asked = set(re.findall(r"\bray_\w+", " ".join(query for panel in PANELS for query, _ in panel.queries)))
    assert asked <= samples
    labels = [line for line in ended.stdout.splitlines() if line.startswith("ray_hired_failures_total")]
    assert any('stage="read"' in line and 'error_type="OSError"' in line for line in labels)
