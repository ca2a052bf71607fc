"""What came out of a run: the proof that no row was lost, and the page that people read.

``python -m pipeline.report OUTPUT...`` prints finished runs side by side.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from hired.errors import HiredError
from pipeline.manifest import Counts, Manifest, Tokens, read_manifest, write_atomically

REPORT = "report.md"
NUM_SAMPLES = 5


class AccountingError(HiredError):
    """Rows were lost, doubled or invented between input and output."""


def account(output: Path, keys: Iterable[str]) -> tuple[Counts, Tokens]:
    """Counts and tokens of what lies in the two tables, read back from their files.

    Raises AccountingError unless each of ``keys`` lies in exactly one of them, once, and nothing else does.
    """
    columns = ("visual_tokens_full", "visual_tokens_kept", "prompt_tokens", "completion_tokens")
    captions = pq.read_table(output / "captions", columns=["key", *columns])
    dead_letters = pq.read_table(output / "dead_letters", columns=["key", "stage", "error_type"])
    found = Counter(captions["key"].to_pylist())
    found.update(dead_letters["key"].to_pylist())
    _compare(Counter(keys), found)
    errors = zip(dead_letters["stage"].to_pylist(), dead_letters["error_type"].to_pylist(), strict=True)
    by_error = Counter(f"{stage}: {error_type}" for stage, error_type in errors)
    counts = Counts(
        rows=found.total(),
        captions=captions.num_rows,
        dead_letters=dead_letters.num_rows,
        dead_letters_by_error=dict(by_error.most_common()),
    )
    full, kept, prompt, completion = (pc.sum(captions[column]).as_py() or 0 for column in columns)
    return counts, Tokens(visual_full=full, visual_kept=kept, prompt=prompt, completion=completion)


def _compare(expected: Counter[str], found: Counter[str]) -> None:
    lost, extra = expected - found, found - expected
    if lost or extra:
        raise AccountingError(
            f"of {expected.total()} rows {lost.total()} were lost{_examples(lost)} "
            f"and {extra.total()} came out too often{_examples(extra)}"
        )


def _examples(keys: Counter[str]) -> str:
    return f" ({', '.join(list(keys)[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def summary(manifest: Manifest, output: Path) -> str:
    """The lines that a job prints at its end."""
    counts, tokens = manifest.counts, manifest.tokens
    lines = [
        f"{counts.rows} rows: {counts.captions} captions, {counts.dead_letters} dead letters; "
        f"every row is in exactly one table. {manifest.wall_s:.1f} s.",
        *(f"  {number:6} {error}" for error, number in counts.dead_letters_by_error.items()),
    ]
    if counts.captions:
        share = tokens.visual_kept / tokens.visual_full
        lines.append(
            f"{tokens.visual_kept / counts.captions:.0f} of {tokens.visual_full / counts.captions:.0f} "
            f"visual tokens an image ({share:.1%})"
        )
    places = {
        "captions": "captions",
        "dead letters": "dead_letters",
        "report": REPORT,
        "manifest": "manifest.json",
    }
    return "\n".join([*lines, *(f"{name + ':':14}{output / place}" for name, place in places.items())])


def write_report(manifest: Manifest, output: Path) -> Path:
    """``OUTPUT/report.md``: the summary, what the stages took, and the first captions."""
    configuration = manifest.configuration
    captions = dataset(output / "captions").head(NUM_SAMPLES, columns=["key", "caption"])
    shown = ("model", "policy", "token_budget", "alpha", "prompt", "max_new_tokens", "device", "dtype")
    lines = [
        f"# Run {manifest.run_id}",
        "",
        "```",
        summary(manifest, output),
        "```",
        "",
        *(f"- {name}: `{configuration[name]}`" for name in shown),
        f"- weights: sha256 `{manifest.model.sha256}`",
        "",
        *table([manifest]),
        "",
        "Busy seconds are summed over a stage's workers; loading the models is not counted.",
        "",
        "## The first captions",
        "",
        "| key | caption |",
        "|---|---|",
        *(f"| {_cell(row['key'])} | {_cell(row['caption'])} |" for row in captions.to_pylist()),
    ]
    return write_atomically(output / REPORT, "\n".join(lines) + "\n")


def table(manifests: Sequence[Manifest]) -> list[str]:
    """Runs side by side, a line a stage, in Markdown."""
    lines = [
        "| policy | token budget | stage | rows | busy s | rows a busy s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for manifest in manifests:
        policy, budget = manifest.configuration["policy"], manifest.configuration["token_budget"]
        lines += [
            f"| {policy} | {budget} | {stage} | {cost.rows} | {cost.busy_s:.2f} | "
            f"{cost.rows / cost.busy_s:.1f} | {cost.peak_rss_bytes / 2**20:.0f} |"
            for stage, cost in manifest.stages.items()
        ]
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print("\n".join(table([read_manifest(Path(output)) for output in sys.argv[1:]])))
