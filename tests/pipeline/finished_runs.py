"""A finished run as its manifest tells it, made up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.costs import StageCost
from pipeline.manifest import Manifest, Model, Session
from pipeline.tally import Counts, Example, Histograms, Tokens

STARTED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def session(rows: int, wall_s: float, *, before: int = 0, number: int = 1) -> Session:
    """Rows that came evenly, from the tenth part of the time on."""
    times = [wall_s * (1 + 9 * step / 10) / 10 for step in range(11)]
    progress = [(time, before + rows * step // 10) for step, time in enumerate(times)]
    return Session(
        run_id=f"session-{number}",
        started_at=STARTED_AT,
        finished_at=STARTED_AT + timedelta(seconds=wall_s),
        wall_s=wall_s,
        rows=rows,
        progress=progress,
        cluster={"CPU": 4.0, "GPU": 2.0},
    )


def manifest(**changes: Any) -> Manifest:
    """A hundred rows of which three failed; ``configuration`` is added to what every run has."""
    configuration = {
        "input": "photos",
        "output": "/out",
        "policy": "hired",
        "token_budget": 0.2,
        "gpu_hour_price": None,
        "prompts": None,
        "generate": {"max_actors": 2, "num_gpus": 1.0},
    }
    whole: dict[str, Any] = {
        "run_id": "run-1",
        "started_at": STARTED_AT,
        "finished_at": STARTED_AT + timedelta(hours=1),
        "wall_s": 1800.0,
        "command": "python jobs/caption_corpus.py --input photos --prompt 'What is <this>?'",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "model": Model(name="embedded", sha256="0123abcd" * 8, files={"model.safetensors": "f" * 64}),
        "counts": Counts(
            rows=100,
            captions=97,
            dead_letters=3,
            retryable=1,
            dead_letters_by_error={"read: TimeoutError": 1, "partition: UnreadableImageError": 2},
        ),
        "duplicates": 0,
        "tokens": Tokens(visual_full=97_000, visual_kept=19_400, prompt=30_000, completion=970),
        "histograms": Histograms(visual_full={960: 97}, visual_kept={128: 40, 192: 57}),
        "failures": {
            "partition: UnreadableImageError": [
                Example(key="a.jpg", message="the image is empty (0 bytes)"),
                Example(key="b.jpg", message="no picture"),
            ],
            "read: TimeoutError": [Example(key="c.jpg", message="no answer within 30 s")],
        },
        "stages": {
            "read": StageCost(rows=100, busy_s=9.0, peak_rss_bytes=2**28),
            "generate": StageCost(rows=97, busy_s=2700.0, peak_rss_bytes=2**30),
        },
        "sessions": [session(60, 1000.0), session(40, 800.0, before=60, number=2)],
        "configuration": configuration | changes.pop("configuration", {}),
    }
    return Manifest(**(whole | changes))
