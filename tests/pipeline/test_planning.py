"""Planning: what a trial tells of a rate, and what is remembered of a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hired.errors import ConfigurationError
from pipeline import planning, run
from pipeline.balance import Measurement, StageMeasurement
from pipeline.config import Config, from_tree
from pipeline.opening import SUCCESS
from pipeline.plan import Plan
from pipeline.planning import FILLING, MEASURED, PLAN, Measured, measured_before, plan_corpus, trial
from pipeline.resources import Cluster, settle
from pipeline.run import caption_corpus
from pipeline.storage import Store
from tests.pictures import picture, saved

CLUSTER = Cluster(4)


def settled(**options: Any) -> Config:
    return settle(from_tree({"input": "in", "output": "out", "device": "cpu", **options}), CLUSTER)


@given(
    st.lists(st.tuples(st.floats(0, 0.99), st.integers(1, 64)), max_size=20),
    st.integers(3, 40),
    st.floats(0.1, 10),
    st.floats(1, 100),
)
def test_the_rate_is_that_of_a_full_pipeline(
    filling: list[tuple[float, int]], count: int, every_s: float, first_s: float
) -> None:
    """Whatever came in the first part, eight rows follow in each interval."""
    steady_s = (count - 1) * every_s
    filling_s = 0.99 * steady_s * FILLING / (1 - FILLING)
    begins = sorted([(0.0, 3), *filling])
    arrivals = [(first_s + share * filling_s, float(rows)) for share, rows in begins]
    arrivals += [(first_s + filling_s + number * every_s, 8.0) for number in range(count)]
    found = trial(arrivals, bound=16 / every_s)
    assert found is not None
    assert found.share == pytest.approx(0.5)
    assert found.first_rows_s == first_s


@pytest.mark.parametrize("arrivals", [[], [(3.0, 32.0)]])
def test_too_few_answers_tell_no_rate(arrivals: list[tuple[float, float]]) -> None:
    assert trial(arrivals, bound=10) is None


def test_a_measurement_serves_the_same_workers_on_the_same_cluster_again(tmp_path: Path) -> None:
    config, store = settled(), Store(tmp_path)
    assert measured_before(config, store, CLUSTER) is None
    stages = {"read": StageMeasurement(rows=8, calls=1, seconds=1, fastest_s=1, slowest_s=1, cpu_s=0)}
    for name, pool in config.pools.items():
        stages[name] = StageMeasurement(
            rows=8,
            calls=1,
            seconds=1,
            fastest_s=1,
            slowest_s=1,
            cpu_s=1,
            batch_size=pool.batch_size or 1,
            threads=pool.threads or 1,
        )
    measurement = Measurement(rows=8, stages=stages, visual_full=4, visual_kept=2, completion_tokens=3)
    kept = Measured(num_cpus=4, num_gpus=0, measurement=measurement)
    store.write(MEASURED, kept.model_dump_json().encode())
    assert measured_before(config, store, CLUSTER) == measurement
    assert measured_before(settled(generate={"batch_size": 7}), store, CLUSTER) is None
    assert measured_before(settled(encode={"threads": 3}), store, CLUSTER) is None
    assert measured_before(config, store, Cluster(8)) is None
    assert measured_before(config.model_copy(update={"device": "cuda"}), store, CLUSTER) is None


def test_a_plan_starts_no_workers_that_cannot_be_in_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(saved(picture(64, 48), "PNG"))
    monkeypatch.setattr(planning, "connect", lambda config: Cluster(4, memory_bytes=2**30))
    config = from_tree(
        {
            "input": str(tmp_path / "in"),
            "output": str(tmp_path / "out"),
            "model": str(checkpoint),
            "device": "cpu",
        }
    )
    with pytest.raises(ConfigurationError, match="GiB of memory"):
        plan_corpus(config)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_trial_commits_nothing_and_the_run_measures_no_second_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.png").write_bytes(saved(picture(60 + number, 50), "PNG"))
    config = from_tree(
        {
            "input": str(folder),
            "output": str(output),
            "model": str(checkpoint),
            "plan_seconds": 2,
            "rows_per_unit": 4,
            "max_new_tokens": 4,
            "generate": {"batch_size": 4},
        }
    )
    plan = plan_corpus(config)
    assert plan.rows_tried > 0
    assert plan.rate == pytest.approx(plan.share * min(plan.limits.values()))
    assert not (output / SUCCESS).exists()
    assert not list(output.glob("*.parquet"))
    assert Plan.model_validate_json((output / PLAN).read_bytes()) == plan

    def again(*_: object) -> Measurement:
        raise AssertionError("the stages are measured a second time")

    monkeypatch.setattr(run, "ROWS_TO_MEASURE_FOR", 1)
    monkeypatch.setattr(run, "measured", again)
    manifest = caption_corpus(config)
    assert manifest.counts.captions == 60
    assert manifest.plan == plan
