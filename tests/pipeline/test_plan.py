"""Plans: laws that hold for any measurement and any cluster, and measuring with the real stages."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hired.errors import ConfigurationError
from pipeline import columns
from pipeline.balance import (
    CPUS,
    GPUS,
    Measurement,
    StageMeasurement,
    Workers,
    balanced,
    limits,
    settle_pools,
    workers,
)
from pipeline.columns import Batch, Failure
from pipeline.config import Config, from_tree
from pipeline.costs import StageCost, metered
from pipeline.measurement import measure
from pipeline.plan import Actual, Plan, Trial, against, describe, make_plan, parse_cluster
from pipeline.questions import Question, to_json
from pipeline.resources import Cluster, settle
from tests.pictures import picture, saved

SECONDS = st.floats(1e-5, 30)


def config(**options: Any) -> Config:
    return from_tree({"input": "in", "output": "out", **options})


def stage(seconds: float, **options: Any) -> StageMeasurement:
    values = {
        "rows": 64,
        "calls": 8,
        "fastest_s": 0.9 * seconds,
        "slowest_s": 1.2 * seconds,
        "cpu_s": seconds,
    }
    return StageMeasurement(seconds=seconds, **(values | options))


def measurement(
    read: float = 0.001,
    partition: float = 0.01,
    encode: float = 0.02,
    generate: float = 0.05,
    *,
    on_gpu: bool = False,
    **options: Any,
) -> Measurement:
    models: dict[str, Any] = {"on_gpu": on_gpu, "load_s": 4.0}
    if on_gpu:
        models["num_gpus"] = 0.5
    stages = {
        "read": stage(read, cpu_s=0.0, bytes=2e5, batch_size=16),
        "partition": stage(partition, batch_size=2, handoff_s=partition / 10),
        "encode": stage(encode, batch_size=8, **models),
        "generate": stage(generate, batch_size=32, **models),
    }
    tokens = {"visual_full": 2928.0, "visual_kept": 586.0, "completion_tokens": 40.5}
    return Measurement(rows=64, stages=stages, import_s=5.0, **(tokens | options))


measurements = st.builds(measurement, SECONDS, SECONDS, SECONDS, SECONDS)
gpu_measurements = st.builds(measurement, SECONDS, SECONDS, SECONDS, SECONDS, on_gpu=st.just(True))
cpu_clusters = st.builds(Cluster, num_cpus=st.integers(1, 256).map(float))
gpu_clusters = st.builds(
    lambda gpus, cpus: Cluster(num_cpus=float(gpus * cpus), num_gpus=float(gpus)),
    st.integers(1, 64),
    st.integers(4, 32),
)
cases = st.one_of(st.tuples(measurements, cpu_clusters), st.tuples(gpu_measurements, gpu_clusters))


def reserved(pools: dict[str, Workers] | Any) -> tuple[float, float]:
    return (
        sum(pool.actors * pool.num_cpus for pool in pools.values()),
        sum(pool.actors * pool.num_gpus for pool in pools.values()),
    )


@given(
    cases,
    st.sampled_from(["read", "partition", "encode", "generate"]),
    st.integers(1, 9),
    st.integers(1, 10**6),
)
def test_more_workers_are_never_slower(
    case: tuple[Measurement, Cluster], name: str, more: int, rows: int
) -> None:
    measured, cluster = case
    pools = dict(balanced(measured, cluster))
    own = pools[name]
    grown = pools | {name: Workers(own.actors + more, own.num_cpus, own.num_gpus, own.threads)}
    before = make_plan(measured, rows, cluster, pools=pools, start_up_s=10)
    after = make_plan(measured, rows, cluster, pools=grown, start_up_s=10)
    assert after.rate >= before.rate
    assert after.eta_s <= before.eta_s


@given(cases)
def test_the_bottleneck_is_what_allows_the_least(case: tuple[Measurement, Cluster]) -> None:
    plan = make_plan(case[0], 1000, case[1], start_up_s=0)
    assert plan.limits[plan.bottleneck] == min(plan.limits.values()) == plan.rate
    for planned in plan.stages:
        assert planned.busy <= 1 + 1e-9
        assert planned.needed <= planned.actors
        assert plan.limits[planned.name] == pytest.approx(planned.pool_rate)


@given(cases, st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_rows_never_take_less(case: tuple[Measurement, Cluster], one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    plans = [make_plan(case[0], rows, case[1], start_up_s=7, gpu_hour_price=2.5) for rows in (fewer, more)]
    assert plans[0].eta_s <= plans[1].eta_s
    assert plans[0].gpu_hours <= plans[1].gpu_hours
    assert (plans[0].cost or 0) <= (plans[1].cost or 0)
    assert plans[0].bytes <= plans[1].bytes


@given(cases)
def test_no_core_and_no_gpu_is_given_away_twice(case: tuple[Measurement, Cluster]) -> None:
    measured, cluster = case
    cpus, gpus = reserved(balanced(measured, cluster))
    assert cpus <= cluster.num_cpus + 1e-6
    assert gpus <= cluster.num_gpus + 1e-6


@given(cases)
def test_settled_pools_are_what_the_cluster_takes(case: tuple[Measurement, Cluster]) -> None:
    """``settle`` refuses pools that do not fit, so that it returns is the proof."""
    measured, cluster = case
    settled = settle_pools(config(device="cuda" if measured.on_gpu else "cpu"), measured, cluster)
    cpus, gpus = reserved(workers(settled, cluster))
    assert cpus <= cluster.num_cpus + 1e-6
    assert gpus <= cluster.num_gpus + 1e-6
    for pool in (settled.partition, settled.encode, settled.generate):
        assert pool.max_actors is not None
        assert pool.min_actors <= pool.max_actors


@given(cases)
def test_balanced_pools_are_no_slower_than_the_defaults(case: tuple[Measurement, Cluster]) -> None:
    """But for reading: the defaults reserve nothing for it beyond two tasks."""
    measured, cluster = case
    defaults = settle(config(device="cuda" if measured.on_gpu else "cpu"), cluster)
    by_default = limits(measured, workers(defaults, cluster), cluster)
    chosen = limits(measured, balanced(measured, cluster), cluster)
    if measured.on_gpu:
        assert min(chosen.values()) >= 0.999 * min(by_default.values())
    assert chosen[CPUS] == by_default[CPUS]


@given(cases, st.floats(0.05, 1.2), st.floats(0, 600))
def test_a_trial_tells_what_share_of_the_bound_is_reached(
    case: tuple[Measurement, Cluster], share: float, first_rows_s: float
) -> None:
    measured, cluster = case
    bound = make_plan(measured, 10**6, cluster, start_up_s=5)
    trial = Trial(rows=share * bound.rate * 60, seconds=60, first_rows_s=first_rows_s, bound=bound.rate)
    plan = make_plan(measured, 10**6, cluster, trial=trial, start_up_s=5)
    assert plan.share == pytest.approx(share)
    assert plan.rate == pytest.approx(share * bound.rate)
    assert plan.limits == bound.limits
    waited_s = 5 + max(first_rows_s, plan.load_s)
    assert plan.eta_s == pytest.approx(waited_s + 10**6 / plan.rate)


def test_a_plan_says_whether_the_pipeline_was_tried() -> None:
    measured = measurement()
    bound = make_plan(measured, 1000, Cluster(2), start_up_s=0)
    assert "was not tried" in describe(bound)
    trial = Trial(rows=0.7 * bound.rate * 60, seconds=60, first_rows_s=20, bound=bound.rate)
    text = describe(make_plan(measured, 1000, Cluster(2), trial=trial, start_up_s=0))
    assert "70% of what generate would allow alone, as tried on" in text
    assert "was not tried" not in text


def test_a_cluster_of_gpus_is_bound_by_its_gpus_when_decoding_is_fed() -> None:
    measured = measurement(partition=0.01, encode=0.01, generate=0.03, on_gpu=True)
    plan = make_plan(measured, 10**6, Cluster(64, 8), start_up_s=60, gpu_hour_price=2.0)
    assert plan.bottleneck == GPUS
    assert plan.rate == pytest.approx(8 / 0.04)
    actors = {planned.name: planned.actors for planned in plan.stages}
    assert actors["generate"] == 8
    assert 4 <= actors["encode"] <= 8
    assert actors["partition"] == 3  # 200 images/s at 11 ms each
    assert plan.eta_s == pytest.approx(5000, rel=0.02)
    assert plan.gpu_hours == pytest.approx(8 * plan.eta_s / 3600)
    assert plan.cost == pytest.approx(2 * plan.gpu_hours)


def test_a_cluster_of_gpus_with_few_cores_is_bound_by_decoding() -> None:
    measured = measurement(partition=0.5, encode=0.01, generate=0.03, on_gpu=True)
    plan = make_plan(measured, 1000, Cluster(32, 8), start_up_s=60)
    assert plan.bottleneck == "partition"


def test_on_few_cores_what_all_stages_take_together_bounds_the_rate() -> None:
    measured = measurement(read=0.001, partition=0.03, encode=0.03, generate=0.03)
    plan = make_plan(measured, 1000, Cluster(2), start_up_s=0)
    assert plan.bottleneck == CPUS
    assert plan.rate == pytest.approx(2 / 0.093)
    assert plan.rate < min(planned.pool_rate for planned in plan.stages)


def test_on_many_cores_the_slowest_stage_gets_most_of_them() -> None:
    measured = measurement(partition=0.01, encode=0.05, generate=0.5)
    pools = balanced(measured, Cluster(32))
    cores = {name: pool.actors * pool.num_cpus for name, pool in pools.items()}
    assert cores["generate"] > 20 > cores["encode"] >= 1
    assert pools["generate"].threads <= 8
    default = limits(measured, workers(settle(config(), Cluster(32)), Cluster(32)), Cluster(32))
    assert min(limits(measured, pools, Cluster(32)).values()) > 1.3 * min(default.values())


def test_slow_storage_gets_readers() -> None:
    measured = measurement(read=0.2, partition=0.005, encode=0.005, generate=0.01, on_gpu=True)
    pools = balanced(measured, Cluster(64, 8))
    rate = min(limits(measured, pools, Cluster(64, 8)).values())
    assert pools["read"].actors > 10
    assert pools["read"].actors * 5 >= rate * 0.999


def test_what_the_configuration_gives_stays() -> None:
    measured = measurement(on_gpu=True)
    given = config(
        device="cuda",
        partition={"max_actors": 5, "min_actors": 2},
        encode={"num_gpus": 0.25, "max_actors": 1},
        generate={"threads": 3, "num_cpus": 2.0},
    )
    settled = settle_pools(given, measured, Cluster(64, 4))
    assert (settled.partition.min_actors, settled.partition.max_actors) == (2, 5)
    assert (settled.encode.num_gpus, settled.encode.max_actors) == (0.25, 1)
    assert (settled.generate.threads, settled.generate.num_cpus) == (3, 2.0)
    assert settled.generate.max_actors == settled.generate.min_actors == 4


def test_one_encode_worker_starts_so_that_every_generate_worker_finds_its_gpu() -> None:
    """Ray packs fractions onto one GPU before it goes on to the next."""
    settled = settle_pools(config(device="cuda"), measurement(encode=0.05, on_gpu=True), Cluster(64, 4))
    assert settled.encode.min_actors == 1
    assert settled.encode.max_actors == 4
    assert settled.generate.min_actors == settled.generate.max_actors == 4
    assert (settled.encode.num_gpus or 0) + (settled.generate.num_gpus or 0) <= 1


def test_an_encoder_that_needs_little_memory_leaves_it_to_the_cache() -> None:
    measured = measurement(on_gpu=True)
    small = measured.stages["encode"].model_copy(update={"gpu_memory_share": 0.04})
    small_one = measured.model_copy(update={"stages": measured.stages | {"encode": small}})
    settled = settle_pools(config(device="cuda"), small_one, Cluster(64, 4))
    assert settled.encode.num_gpus == pytest.approx(0.1)
    assert settled.generate.num_gpus == pytest.approx(0.9)


def test_a_language_model_over_two_gpus_leaves_some_to_the_encoder() -> None:
    given = config(device="cuda", encode={"num_gpus": 1}, generate={"num_gpus": 2})
    light = settle_pools(given, measurement(encode=0.01, generate=0.05, on_gpu=True), Cluster(64, 8))
    assert (light.encode.max_actors, light.generate.max_actors) == (1, 3)
    heavy = settle_pools(given, measurement(encode=0.05, generate=0.05, on_gpu=True), Cluster(64, 9))
    assert (heavy.encode.max_actors, heavy.generate.max_actors) == (3, 3)


def test_a_cluster_that_grows_starts_with_one_worker_a_stage() -> None:
    settled = settle_pools(config(device="cuda", autoscaling=True), measurement(on_gpu=True), Cluster(64, 8))
    assert settled.generate.min_actors == 1
    assert settled.generate.max_actors == 8


@pytest.mark.parametrize(
    ("text", "cpus", "gpus"),
    [
        ("64 CPU, 8 GPU", 64, 8),
        ("8xGPU,64xCPU", 64, 8),
        ("8 GPUs + 64 CPUs", 64, 8),
        ("16cpu", 16, 0),
    ],
)
def test_clusters_have_names(text: str, cpus: float, gpus: float) -> None:
    assert parse_cluster(text) == Cluster(cpus, gpus)


@pytest.mark.parametrize("text", ["", "8 GPU", "8", "64 CPU, 8 TPU", "64 CPU 32 CPU", "0 CPU", "big"])
def test_what_names_no_cluster_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigurationError, match="'64 CPU, 8 GPU'"):
        parse_cluster(text)


def test_a_plan_for_gpus_needs_gpus() -> None:
    with pytest.raises(ConfigurationError, match="measured on a GPU"):
        make_plan(measurement(on_gpu=True), 10, Cluster(64), start_up_s=0)


def test_a_plan_says_what_it_does_not_know() -> None:
    few = measurement().model_copy(update={"rows": 12})
    plan = make_plan(few, 10, Cluster(64, 8), start_up_s=0)
    notes = " ".join(plan.notes)
    assert "the GPUs are not in this estimate" in notes
    assert "only 12 rows" in notes
    assert "generate was measured with 1 threads" in notes


def test_the_text_is_aligned_and_names_all_that_matters() -> None:
    plan = make_plan(
        measurement(failures=0.01, on_gpu=True), 10**6, Cluster(64, 8), start_up_s=60, gpu_hour_price=2.0
    )
    text = describe(plan)
    for part in (
        "64 CPUs, 8 GPUs",
        "1,000,000",
        "10,000 likely to fail",
        "2,928,000,000 before, 586,000,000 after (20.0%)",
        "GPU-hours",
        f"{plan.cost:,.2f}, at 2.00 a GPU-hour",
        "bounded by all GPUs together",
    ):
        assert part in text
    table = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in
             ("stage", "read", "partition", "encode", "generate")]  # fmt: skip
    assert len({len(line) for line in table}) == 1
    assert max(map(len, text.splitlines())) < 140


def test_a_plan_survives_the_manifest() -> None:
    plan = make_plan(measurement(), 100, Cluster(4), start_up_s=1)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_plan_and_actual_stand_side_by_side() -> None:
    plan = make_plan(measurement(on_gpu=True), 1000, Cluster(64, 8), start_up_s=60)
    actual = Actual(
        rows=1000,
        wall_s=1.2 * plan.eta_s,
        failures=0,
        visual_full=2_928_000,
        visual_kept=586_000,
        completion_tokens=81_000,
        stages={"encode": StageCost(rows=1000, busy_s=30, peak_rss_bytes=0)},
        num_gpus=8,
        first_rows_s=70,
    )
    found = {line.what: line for line in against(plan, actual)}
    assert found["time"].error == pytest.approx(0.2)
    assert found["GPU-hours"].error == pytest.approx(0.2)
    assert found["visual tokens an image, after"].error == pytest.approx(0)
    assert found["output tokens an image"].error == pytest.approx(1)
    assert found["encode, a row"].planned == pytest.approx(20)
    assert found["encode, a row"].actual == pytest.approx(30)
    assert found["failures a thousand rows"].error is None
    assert "generate, a row" not in found


# ---- measuring ----


def sample(count: int = 8) -> list[Batch]:
    """Rows as ReadStage makes them, the second of which could not be read."""
    rows: list[bytes | Failure] = [bytes(100) for _ in range(count)]
    rows[1] = Failure("read", "OSError", "gone", True)
    keys = np.array([str(number) for number in range(count)], dtype=object)
    whole = {"key": keys} | columns.of_images(rows) | metered("read", count, time.perf_counter() - 0.008)
    return [{name: column[:5] for name, column in whole.items()}, {name: c[5:] for name, c in whole.items()}]


class FakeStage:
    """Passes its rows on after a while, longer at the first call."""

    name = ""
    warm_up_s, row_s = 0.05, 0.002

    def __init__(self, options: Config) -> None:
        torch.set_num_threads(3)
        self.sizes: list[int] = []
        type(self).made = self  # type: ignore[attr-defined]

    def __call__(self, batch: Batch) -> Batch:
        time.sleep(self.row_s * len(batch["key"]) + (0 if self.sizes else self.warm_up_s))
        self.sizes.append(len(batch["key"]))
        return batch


class FakePartition(FakeStage):
    """The first."""

    name = "partition"


class FakeEncode(FakeStage):
    """The second."""

    name = "encode"


class FakeGenerate(FakeStage):
    """The last, with what captions have."""

    name = "generate"

    def __call__(self, batch: Batch) -> Batch:
        number = np.full(len(batch["key"]), 10)
        return super().__call__(batch) | {
            "visual_tokens_full": 10 * number,
            "visual_tokens_kept": 2 * number,
            "completion_tokens": number,
        }


FAKES = (FakePartition, FakeEncode, FakeGenerate)


def settled(**options: Any) -> Config:
    return settle(config(device="cpu", **options), Cluster(2))


def test_stages_are_measured_on_the_sample_without_their_first_call() -> None:
    before = torch.get_num_threads()
    measured = measure(settled(), sample(), stages=FAKES, seconds=60)
    assert list(measured.stages) == ["read", "partition", "encode", "generate"]
    for name in ("partition", "encode", "generate"):
        # Generate's two calls at once share their time.
        expected = FakeStage.row_s / (2 if name == "generate" else 1)
        assert expected * 0.9 < measured.stages[name].seconds < expected * 2 + 0.002
        assert measured.stages[name].fastest_s <= measured.stages[name].seconds
    assert measured.stages["read"].seconds == pytest.approx(0.001, rel=0.2)
    assert measured.stages["read"].bytes == pytest.approx(7 * 100 / 8)
    assert measured.rows == 8
    assert (measured.visual_full, measured.visual_kept, measured.completion_tokens) == (100, 20, 10)
    assert measured.failures == pytest.approx(1 / 8)
    assert torch.get_num_threads() == before


def test_stages_get_batches_of_their_own_size_and_generate_full_ones() -> None:
    options = settled(partition={"batch_size": 3}, encode={"batch_size": 8}, generate={"batch_size": 16})
    measured = measure(options, sample(), stages=FAKES, seconds=60)
    assert FakePartition.made.sizes == [3] + 3 * [3, 3, 2]  # type: ignore[attr-defined]
    assert FakeEncode.made.sizes == [8] + 3 * [8]  # type: ignore[attr-defined]
    assert set(FakeGenerate.made.sizes) == {16}  # type: ignore[attr-defined]
    assert measured.stages["generate"].batch_size == 16


def test_a_stage_too_slow_for_its_time_is_measured_by_its_first_call() -> None:
    measured = measure(settled(), sample(), stages=FAKES, seconds=0.001)
    assert {stage.calls for name, stage in measured.stages.items() if name != "read"} == {1}
    assert measured.stages["encode"].seconds > FakeStage.warm_up_s / 8


def test_a_sample_that_cannot_be_read_measures_nothing() -> None:
    gone: list[bytes | Failure] = [Failure("read", "OSError", "no such bucket", True)]
    batch = {"key": np.array(["a"], dtype=object)} | columns.of_images(gone)
    for batches, said in (([batch], "no such bucket"), ([], "no rows")):
        with pytest.raises(ConfigurationError, match=said):
            measure(settled(), batches, stages=FAKES)


def test_errors_of_a_stage_end_the_measuring() -> None:
    class Broken(FakeGenerate):
        def __call__(self, batch: Batch) -> Batch:
            raise ConfigurationError("no memory is left for the key-value cache")

    with pytest.raises(ConfigurationError, match="no memory"):
        measure(settled(), sample(), stages=(FakePartition, FakeEncode, Broken), seconds=1)


def test_numbers_are_finite() -> None:
    measured = measure(settled(), sample(), stages=FAKES, seconds=0.2)
    plan = make_plan(measured, 1000, Cluster(2), start_up_s=0)
    assert all(map(math.isfinite, plan.limits.values()))
    assert plan.bottleneck


def test_the_real_stages_are_measured_and_a_plan_comes_of_it(checkpoint: Path) -> None:
    rows: list[bytes | Failure] = [saved(picture(90 + 10 * n, 60), "PNG") for n in range(5)]
    questions = [Question(n, f"q{n}", "What is it?", 4, 0.0, 1.0, 0, ()) for n in range(2)]
    column = np.empty(6, dtype=object)
    column[:] = to_json(questions)
    batch = {
        "index": np.arange(6),
        "key": np.array(list("abcdef"), dtype=object),
        "path": np.array(list("abcdef"), dtype=object),
        "questions": column,
        "is_sample": np.zeros(6, bool),
    } | columns.of_images([*rows, b"no image"])
    options = settled(
        model=str(checkpoint), isolated_decoding=False, max_new_tokens=4, generate={"batch_size": 6}
    )
    measured = measure(options, [batch], seconds=2)
    assert 0 < measured.visual_kept < measured.visual_full
    assert 2 <= measured.completion_tokens <= 8 * 5 / 6 + 1e-9
    assert measured.failures == pytest.approx(1 / 6)
    assert measured.import_s > 0.5
    for name in ("partition", "encode", "generate"):
        of_stage = measured.stages[name]
        assert of_stage.rows == 6
        assert of_stage.seconds > 0
        assert of_stage.cpu_s > 0
        assert of_stage.bytes > 0
    assert measured.stages["partition"].bytes > measured.stages["encode"].bytes
    plan = make_plan(measured, 10_000, Cluster(2), start_up_s=5)
    assert plan.bottleneck in plan.limits
    assert plan.load_s > measured.import_s
    assert "partition" in describe(plan)
