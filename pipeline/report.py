"""What came out of a run, for people: the page ``report.html``, and the lines that a job prints at its end.

The page is one file that asks the network for nothing. ``python -m pipeline.report OUTPUT...`` prints
finished runs side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline import charts
from pipeline.gallery import Drawing, GallerySample, draw
from pipeline.manifest import MANIFEST, Manifest, read_manifest
from pipeline.plan import Actual, Comparison, against
from pipeline.storage import Store
from pipeline.tally import Example

REPORT = "report.html"
TEMPLATE = "report.html.jinja"
NUM_SHOWN = 12


def write_report(manifest: Manifest, store: Store, gallery: Sequence[GallerySample]) -> str:
    """Where the page lies: ``OUTPUT/report.html``."""
    store.write(REPORT, page(manifest, gallery).encode())
    return store.uri(REPORT)


def page(manifest: Manifest, gallery: Sequence[GallerySample]) -> str:
    """The whole page, in HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration}
    template = environment.from_string(resources.files("pipeline").joinpath(TEMPLATE).read_text("utf-8"))
    report = Report(manifest)
    return template.render(
        report=report,
        manifest=manifest,
        charts=charts,
        throughput=charts.throughput(manifest.sessions),
        tokens=charts.histogram(manifest.histograms.visual_full, manifest.histograms.visual_kept),
        gallery=[Shown.of(sample) for sample in gallery[:NUM_SHOWN]],
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample of the gallery."""

    key: str
    prompt: str
    caption: str
    full: Drawing
    sub_images: Drawing

    @classmethod
    def of(cls, sample: GallerySample) -> Shown:
        return cls(sample.key, sample.prompt, sample.caption, *draw(sample))


@dataclass(frozen=True, slots=True)
class StageUse:
    """A stage's part of the run; ``workers`` were busy on average, of ``most`` that there were."""

    name: str
    rows: int
    busy_s: float
    workers: float
    most: int | None
    peak_rss_bytes: int

    @property
    def rate(self) -> float | None:
        """Rows a second of a worker that never waits."""
        return self.rows / self.busy_s if self.busy_s else None

    @property
    def share(self) -> float | None:
        """Of the workers' time, what they were busy; None where their number is not known."""
        return min(1.0, self.workers / self.most) if self.most else None


@dataclass(frozen=True, slots=True)
class Failures:
    """One kind of failure."""

    kind: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Report:
    """What follows from a manifest."""

    manifest: Manifest

    @property
    def unit(self) -> str:
        """What ends in the two tables: a row that is asked several questions ends in several answers."""
        return "answers" if self.manifest.configuration.get("prompts") else "rows"

    @property
    def kept_share(self) -> float | None:
        """Of the visual tokens before dropping, what was sent on."""
        tokens = self.manifest.tokens
        return tokens.visual_kept / tokens.visual_full if tokens.visual_full else None

    @property
    def rate(self) -> float | None:
        """Rows a second from start to end, all sessions together."""
        wall_s = self.manifest.wall_s
        return sum(session.rows for session in self.manifest.sessions) / wall_s if wall_s else None

    @cached_property
    def gpu_hours(self) -> float:
        return self._hours("GPU")

    @cached_property
    def cpu_hours(self) -> float:
        return self._hours("CPU")

    def _hours(self, resource: str) -> float:
        """Of the whole cluster, busy or not: that is what is paid for."""
        sessions = self.manifest.sessions
        return sum(session.cluster.get(resource, 0.0) * session.wall_s / 3600 for session in sessions)

    @property
    def price(self) -> float | None:
        price = self.manifest.configuration.get("gpu_hour_price")
        return None if price is None else float(price)

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def cost_per_thousand(self) -> float | None:
        captions = self.manifest.counts.captions
        return None if self.cost is None or not captions else 1000 * self.cost / captions

    @cached_property
    def stages(self) -> list[StageUse]:
        wall_s = self.manifest.wall_s
        return [
            StageUse(
                name=name,
                rows=cost.rows,
                busy_s=cost.busy_s,
                workers=cost.busy_s / wall_s if wall_s else 0.0,
                most=_pool(self.manifest.configuration, name).get("max_actors"),
                peak_rss_bytes=cost.peak_rss_bytes,
            )
            for name, cost in self.manifest.stages.items()
        ]

    @cached_property
    def busiest(self) -> str | None:
        """The stage whose workers waited least."""
        known = [stage for stage in self.stages if stage.share is not None]
        return max(known, key=lambda stage: stage.share or 0.0).name if known else None

    @property
    def failures(self) -> list[Failures]:
        """The most frequent first."""
        counts = self.manifest.counts.dead_letters_by_error
        return [
            Failures(kind, count, self.manifest.failures.get(kind, []))
            for kind, count in sorted(counts.items(), key=lambda item: -item[1])
        ]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Plan against actual; none without a plan.

        Sessions that were killed left no times: what all did is scaled down to the rows of those that did.
        """
        plan, counts, tokens = self.manifest.plan, self.manifest.counts, self.manifest.tokens
        if plan is None:
            return []
        rows = sum(session.rows for session in self.manifest.sessions)
        images = self.manifest.stages["read"].rows if "read" in self.manifest.stages else counts.rows
        an_answer, an_image = rows / max(1, counts.rows), rows / max(1, images)
        actual = Actual(
            rows=rows,
            wall_s=self.manifest.wall_s,
            failures=round(counts.dead_letters * an_answer),
            visual_full=round(tokens.visual_full * an_answer),
            visual_kept=round(tokens.visual_kept * an_answer),
            completion_tokens=round(tokens.completion * an_image),
            stages=self.manifest.stages,
            num_gpus=max(
                (session.cluster.get("GPU", 0.0) for session in self.manifest.sessions), default=0.0
            ),
            first_rows_s=self._first_rows_s,
        )
        return against(plan, actual)

    @property
    def _first_rows_s(self) -> float | None:
        """From the start of the first session to its first commit."""
        if not self.manifest.sessions:
            return None
        return next((seconds for seconds, rows in self.manifest.sessions[0].progress if rows), None)

    @property
    def configuration(self) -> Iterator[tuple[str, str]]:
        """Every option that has a value, by its dotted name."""
        return _leaves(self.manifest.configuration)


def summary(manifest: Manifest, output: str | Path) -> str:
    """The lines that a job prints at its end."""
    counts, tokens, report = manifest.counts, manifest.tokens, Report(manifest)
    lines = [
        f"{counts.rows} {report.unit}: {counts.captions} captions, {counts.dead_letters} dead letters; "
        f"each is in exactly one table. {duration(manifest.wall_s)}.",
        *(f"  {count:6} {error}" for error, count in counts.dead_letters_by_error.items()),
    ]
    if counts.retryable:
        lines.append(f"{counts.retryable} of them may succeed another time: add --retry-failed")
    if counts.captions and report.kept_share is not None:
        lines.append(
            f"{tokens.visual_kept / counts.captions:.0f} of {tokens.visual_full / counts.captions:.0f} "
            f"visual tokens an image ({report.kept_share:.1%})"
        )
    places = {
        "captions": "captions",
        "dead letters": "dead_letters",
        "report": REPORT,
        "manifest": MANIFEST,
    }
    folder = str(output).rstrip("/")
    return "\n".join([*lines, *(f"{name + ':':14}{folder}/{place}" for name, place in places.items())])


def summary_json(manifest: Manifest) -> str:
    """The same and more, as one JSON object for programs."""
    report, output = Report(manifest), str(manifest.configuration["output"]).rstrip("/")
    return json.dumps(
        {
            "run_id": manifest.run_id,
            "output": output,
            "report": f"{output}/{REPORT}",
            "manifest": f"{output}/{MANIFEST}",
            **manifest.counts.model_dump(),
            "duplicates": manifest.duplicates,
            "tokens": manifest.tokens.model_dump(),
            "wall_s": manifest.wall_s,
            "rows_per_s": report.rate,
            "sessions": len(manifest.sessions),
            "gpu_hours": report.gpu_hours,
            "cpu_hours": report.cpu_hours,
            "cost": report.cost,
            "stages": {name: cost.model_dump() for name, cost in manifest.stages.items()},
        },
        indent=2,
    )


def table(manifests: Sequence[Manifest]) -> list[str]:
    """Runs side by side, a line a stage, in Markdown."""
    lines = [
        "| run | policy | token budget | stage | rows | busy s | rows a busy s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for manifest in manifests:
        policy, budget = manifest.configuration["policy"], manifest.configuration["token_budget"]
        lines += [
            f"| {manifest.run_id} | {policy} | {budget} | {stage.name} | {stage.rows} | {stage.busy_s:.2f} | "
            f"{number(stage.rate)} | {stage.peak_rss_bytes / 2**20:.0f} |"
            for stage in Report(manifest).stages
        ]
    return lines


def number(value: float | None) -> str:
    """Three digits or more, with commas; a dash for what is not known."""
    if value is None:
        return "–"  # noqa: RUF001
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people tell them."""
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def _pool(configuration: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    pool = configuration.get(stage)
    return pool if isinstance(pool, dict) else {}


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        elif value is not None:
            yield above + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    print("\n".join(table([read_manifest(output) for output in sys.argv[1:]])))
