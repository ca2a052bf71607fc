"""What the stages took: every stage leaves two columns in its rows, and the sink adds them up."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from pipeline.columns import Batch

SECONDS, PEAK_RSS = "_s", "_peak_rss_bytes"


def metered(stage: str, num_rows: int, started_s: float, child_peak_rss_bytes: int = 0) -> Batch:
    """What the call cost: seconds shared out over its rows, and the process's peak resident memory so far.

    Or that of a child which does its work, where that is more.
    """
    seconds = (time.perf_counter() - started_s) / num_rows
    return {
        stage + SECONDS: np.full(num_rows, seconds, np.float64),
        stage + PEAK_RSS: np.full(num_rows, max(peak_rss_bytes(), child_peak_rss_bytes), np.int64),
    }


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident, shared pages of the object store included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StageCost(BaseModel):
    """Seconds that a stage's workers were busy, added up, and the peak memory of the largest of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    busy_s: float
    peak_rss_bytes: int

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(
            rows=self.rows + other.rows,
            busy_s=self.busy_s + other.busy_s,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
        )


def added(parts: Iterable[Mapping[str, StageCost]]) -> dict[str, StageCost]:
    """The costs of each stage over all parts."""
    whole: dict[str, StageCost] = {}
    for part in parts:
        for stage, cost in part.items():
            whole[stage] = whole[stage] + cost if stage in whole else cost
    return whole


def stage_costs(rows: pa.Table) -> dict[str, StageCost]:
    """What each stage took for these rows, by the columns it left in them.

    Answers to further questions about an image have no seconds (NaN) in the stages that they share.
    """
    stages = [name.removesuffix(SECONDS) for name in rows.column_names if name.endswith(SECONDS)]
    return {stage: _stage_cost(rows, stage) for stage in stages}


def _stage_cost(rows: pa.Table, stage: str) -> StageCost:
    seconds = rows[stage + SECONDS].to_numpy()
    own = seconds[~np.isnan(seconds)]
    return StageCost(
        rows=len(own), busy_s=float(own.sum()), peak_rss_bytes=pc.max(rows[stage + PEAK_RSS]).as_py()
    )
