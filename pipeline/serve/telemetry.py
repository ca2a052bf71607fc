"""What an ingress tells of its requests: at ``GET /metrics``, and through Ray's exporter with all others.

Names and meanings are those of ``pipeline.metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hired.types import Caption
from pipeline import metrics
from pipeline.serve.api_error import ApiError
from pipeline.serve.backend import EngineLoad

# What this process knows; the rest of an endpoint's metrics are told by its workers, through Ray alone.
NAMES = (
    "hired_requests_total",
    "hired_request_failures_total",
    "hired_requests_in_flight",
    "hired_request_seconds",
    "hired_time_to_first_token_seconds",
    "hired_time_per_output_token_seconds",
    "hired_visual_tokens_total",
    "hired_output_tokens_total",
)
LOADS = ("hired_running_sequences", "hired_waiting_sequences", "hired_kv_cache_tokens")


class Telemetry:
    """The metrics of one ingress."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._made = {
            metric.name: _made(metric, self._registry)
            for metric in metrics.METRICS
            if metric.name in NAMES + LOADS
        }
        self._worker = metrics.worker()
        self._in_flight = 0

    def began(self) -> None:
        """A request is in hand."""
        self._now_in_flight(self._in_flight + 1)

    def ended(self, route: str, status: int, seconds: float) -> None:
        """A request is answered, or its client is gone."""
        self._now_in_flight(self._in_flight - 1)
        self._tell("hired_requests_total", 1, route=route, status=str(status))
        self._tell("hired_request_seconds", seconds, route=route)

    def failed(self, error: ApiError) -> None:
        """A request got this instead of an answer, or of the rest of one."""
        self._tell("hired_request_failures_total", 1, code=error.code or error.type)

    def turned_away(self, number: int) -> None:
        """So many requests were answered before they came here: there was no room for them."""
        if number:
            self._tell("hired_requests_total", number, route="other", status="503")
            self._tell("hired_request_failures_total", number, code="overloaded")

    def first_token(self, seconds: float) -> None:
        """The first text of a stream came after so many seconds."""
        self._tell("hired_time_to_first_token_seconds", seconds)

    def answered(self, caption: Caption, decoding_s: float | None) -> None:
        """An answer is whole; ``decoding_s`` are the seconds after its first text, if it was streamed."""
        self._tell("hired_visual_tokens_total", caption.visual_tokens_full, kind="full")
        self._tell("hired_visual_tokens_total", caption.visual_tokens_kept, kind="kept")
        self._tell("hired_output_tokens_total", caption.completion_tokens)
        if decoding_s is not None and caption.completion_tokens > 1:
            self._tell("hired_time_per_output_token_seconds", decoding_s / (caption.completion_tokens - 1))

    def exposition(self, loads: Iterable[EngineLoad]) -> bytes:
        """Everything in Prometheus' text format, with what engines hold now."""
        for name in LOADS:
            self._made[name].clear()
        for load in loads:
            for name, value in (
                ("hired_running_sequences", load.running), ("hired_waiting_sequences", load.waiting)
            ):  # fmt: skip
                self._made[name].labels(worker=load.worker).set(value)
            places = self._made["hired_kv_cache_tokens"]
            places.labels(worker=load.worker, state="held").set(load.places - load.places_free)
            places.labels(worker=load.worker, state="free").set(load.places_free)
        return generate_latest(self._registry)

    def _now_in_flight(self, number: int) -> None:
        self._in_flight = number
        self._tell("hired_requests_in_flight", number, worker=self._worker)

    def _tell(self, name: str, value: float, **labels: str) -> None:
        made = self._made[name].labels(**labels) if labels else self._made[name]
        if isinstance(made, Counter):
            made.inc(value)
        elif isinstance(made, Gauge):
            made.set(value)
        else:
            made.observe(value)
        metrics.tell(name, value, **labels)


def _made(metric: metrics.Metric, registry: CollectorRegistry) -> Any:
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.meaning, metric.labels, registry=registry)
        case "gauge":
            return Gauge(metric.name, metric.meaning, metric.labels, registry=registry)
        case "histogram":
            return Histogram(
                metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.boundaries
            )
