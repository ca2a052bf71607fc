"""The section ``plan``: what ``--plan`` says of a corpus of files, and what the run that follows takes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.benchmark.corpus import configuration, local_cluster, written
from pipeline.benchmark.measure import digits
from pipeline.benchmark.subject import Subject
from pipeline.planning import plan_corpus
from pipeline.report import Report
from pipeline.run import caption_corpus


def measure(subject: Subject) -> dict[str, Any]:
    """Planned and actual values, as in the run's report; ``error`` is 0.1 for ten percent more."""
    with TemporaryDirectory(prefix="benchmark-") as folder, local_cluster(subject):
        config = configuration(subject, written(subject, Path(folder)), Path(folder) / "captions")
        plan = plan_corpus(config)
        manifest = caption_corpus(config)
    return {
        "images": len(subject.files),
        "threads": subject.options.threads,
        "options": list(subject.options.ray_options),
        "bottleneck": plan.bottleneck,
        "comparisons": [
            {
                "what": f"{each.what}, {each.unit}" if each.unit else each.what,
                "planned": digits(each.planned),
                "actual": digits(each.actual),
                "error": None if each.error is None else digits(each.error),
            }
            for each in Report(manifest).comparisons
        ],
    }
