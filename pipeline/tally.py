"""What rows add up to: counts, tokens, histograms, and examples of failures. Tallies of shards are added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from pipeline.costs import StageCost, added

NUM_EXAMPLES = 5
# Bins of the histograms, in tokens.
BIN = 64


class Record(BaseModel):
    """A part of what a run says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(Record):
    """Answers out of rows in; ``dead_letters_by_error`` is keyed by stage and error type, ``read: OSError``.

    A row that is asked several questions ends in as many answers: ``rows`` counts those.
    """

    rows: int = 0
    captions: int = 0
    dead_letters: int = 0
    retryable: int = 0
    dead_letters_by_error: dict[str, int] = {}


class Tokens(Record):
    """Tokens of all captions, newlines included; ``visual_full`` is what keep-all would have sent."""

    visual_full: int = 0
    visual_kept: int = 0
    prompt: int = 0
    completion: int = 0


class Histograms(Record):
    """How many captions had so many visual tokens, before and after dropping, by the start of their bin."""

    visual_full: dict[int, int] = {}
    visual_kept: dict[int, int] = {}


class Example(Record):
    """A row that failed."""

    key: str
    message: str


class Tally(Record):
    """All of it, for a shard or for a run."""

    counts: Counts = Counts()
    tokens: Tokens = Tokens()
    histograms: Histograms = Histograms()
    failures: dict[str, list[Example]] = {}
    stages: dict[str, StageCost] = {}

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            counts=Counts(
                **_sums(self.counts, other.counts, "rows", "captions", "dead_letters", "retryable"),
                dead_letters_by_error=_merged(
                    self.counts.dead_letters_by_error, other.counts.dead_letters_by_error
                ),
            ),
            tokens=Tokens(**_sums(self.tokens, other.tokens, *Tokens.model_fields)),
            histograms=Histograms(
                visual_full=_merged(self.histograms.visual_full, other.histograms.visual_full),
                visual_kept=_merged(self.histograms.visual_kept, other.histograms.visual_kept),
            ),
            failures={
                kind: (self.failures.get(kind, []) + other.failures.get(kind, []))[:NUM_EXAMPLES]
                for kind in {**self.failures, **other.failures}
            },
            stages=added([self.stages, other.stages]),
        )


def tally(captions: pa.Table, dead_letters: pa.Table, stages: Mapping[str, StageCost]) -> Tally:
    """The tally of rows as they lie in the two tables; ``stages`` is what they cost."""
    kinds = [
        f"{stage}: {error_type}"
        for stage, error_type in zip(
            dead_letters["stage"].to_pylist(), dead_letters["error_type"].to_pylist(), strict=True
        )
    ]
    examples: dict[str, list[Example]] = {}
    for kind, key, message in zip(
        kinds, dead_letters["key"].to_pylist(), dead_letters["error"].to_pylist(), strict=True
    ):
        if len(examples.setdefault(kind, [])) < NUM_EXAMPLES:
            examples[kind].append(Example(key=key, message=message))
    return Tally(
        counts=Counts(
            rows=captions.num_rows + dead_letters.num_rows,
            captions=captions.num_rows,
            dead_letters=dead_letters.num_rows,
            retryable=pc.sum(dead_letters["retryable"]).as_py() or 0,
            dead_letters_by_error=dict(Counter(kinds).most_common()),
        ),
        tokens=Tokens(
            visual_full=_total(captions, "visual_tokens_full"),
            visual_kept=_total(captions, "visual_tokens_kept"),
            prompt=_total(captions, "prompt_tokens"),
            completion=_total(captions, "completion_tokens"),
        ),
        histograms=Histograms(
            visual_full=_histogram(captions["visual_tokens_full"]),
            visual_kept=_histogram(captions["visual_tokens_kept"]),
        ),
        failures=examples,
        stages=dict(stages),
    )


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)


def _histogram(column: pa.ChunkedArray) -> dict[int, int]:
    bins, counts = np.unique(column.to_numpy() // BIN * BIN, return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist(), strict=True))


def _sums(one: Record, other: Record, *names: str) -> dict[str, int]:
    return {name: getattr(one, name) + getattr(other, name) for name in names}


Kind = TypeVar("Kind", int, str)


def _merged(one: Mapping[Kind, int], other: Mapping[Kind, int]) -> dict[Kind, int]:
    """The sums, the largest of named kinds first, bins in order."""
    sums = Counter(one) + Counter(other)
    return dict(sorted(sums.items()) if all(isinstance(k, int) for k in sums) else sums.most_common())
