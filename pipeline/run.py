"""A captioning run from configuration to manifest."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from hired import families, policies
from hired.errors import ConfigurationError
from hired.vlm import resolve
from pipeline.balance import Measurement, settle_pools, workers
from pipeline.config import Config
from pipeline.driving import Driver, Stop, check_complete, here, stopped_by_signals
from pipeline.feeding import Feed, start_brake
from pipeline.graph import Stages, answers
from pipeline.guard import Attempts
from pipeline.ledger import Ledger, ShardRecord
from pipeline.manifest import MANIFEST, Manifest, Session
from pipeline.measurement import measure
from pipeline.opening import SUCCESS, Run, check_startable, open_run
from pipeline.plan import Plan, make_plan, parse_cluster
from pipeline.progress import Progress
from pipeline.publishing import Publisher
from pipeline.report import write_report
from pipeline.resources import Cluster, check_memory, settle
from pipeline.samples import gallery, sampled_batches, samples
from pipeline.sinks import check_columns, sinks
from pipeline.storage import Store
from pipeline.work import RetryWork, UnitWork, Work

SESSIONS, PLAN = "_work/sessions", "_work/plan.json"
# Smaller corpora are done before a measurement of the stages pays; it takes this long a stage.
ROWS_TO_MEASURE_FOR, SECONDS_TO_MEASURE = 5_000, 10.0
# How often rows that never came back are fed again before the run gives up.
MAX_PASSES = 3

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to end, and can go on from where it is."""


@dataclass(frozen=True)
class Checked:
    """What a run needs, found to be there before any worker starts."""

    config: Config
    checkpoint: Path
    store: Store


def caption_corpus(config: Config, command: str = "", stages: Stages | None = None) -> Manifest:
    """Caption every image of ``config.input`` into ``config.output``, or go on where a run before ended.

    A finished run is left as it is, unless ``config.retry_failed``. Everything that can be wrong with the
    configuration raises ConfigurationError before a worker starts; SIGTERM ends in Interrupted.
    """
    started_at = datetime.now(UTC)
    run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    checked = check(config)
    owner = f"run {run_id} (process {os.getpid()} on {socket.gethostname()})"
    with checked.store.lock(owner):
        run = open_run(checked.config, checked.store, checked.checkpoint, run_id, command)
        if checked.store.exists(SUCCESS) and not config.retry_failed:
            log.info("run %s is complete", run.identity.run_id)
            return Manifest.model_validate_json(checked.store.read(MANIFEST))
        return _Session(checked, run, run_id, started_at, stages or Stages()).run()


class _Session:
    """One go of a run."""

    def __init__(
        self, checked: Checked, run: Run, session_id: str, started_at: datetime, stages: Stages
    ) -> None:
        self._store, self._run, self._stages = run.store, run, stages
        self._id, self._started_at, self._started_s = session_id, started_at, time.perf_counter()
        self._layout = run.inventory.layout
        self._ledger = Ledger(self._store, self._layout)
        self._publisher = publisher(checked.config, run)
        self._config, self._checkpoint = checked.config, checked.checkpoint
        self._cluster = Cluster(0)

    def run(self) -> Manifest:
        """Does what is left, and publishes it; raises Interrupted."""
        done = self._ledger.num_committed
        with Progress(self._layout.num_rows, done) as progress:
            publish = _remotely if self._publisher.needs_images else here
            driver = Driver(self._ledger, self._publisher, publish, progress)
            try:
                driver.publish_what_is_complete()
                self._work(driver, progress)
            finally:
                driver.close()
                self._write_session(progress.series, self._ledger.num_committed - done)
        check_complete(self._ledger)
        return self._finish()

    def _work(self, driver: Driver, progress: Progress) -> None:
        if not self._ledger.pending_units() and not self._config.retry_failed:
            return
        self._cluster = connect(self._config)
        self._config = self._settled()
        progress.settled({name: pool.max_actors or 0 for name, pool in self._config.pools.items()})
        with stopped_by_signals() as stop:  # from here on: Ray's own handlers came with the connection
            self._passes(driver, stop, progress)

    def _passes(self, driver: Driver, stop: Stop, progress: Progress) -> None:
        for _ in range(MAX_PASSES):
            if not (units := self._ledger.pending_units()):
                break
            self._pass(driver, UnitWork(self._run.inventory, self._run.questionnaire, units), stop)
        if self._config.retry_failed:
            again = self._ledger.retryable_shards(self._ledger.generation + 1)
            if again:
                self._store.delete(SUCCESS)
                progress.again(self._ledger.num_retryable(again))
                self._pass(driver, RetryWork(self._run.inventory, self._run.questionnaire, again), stop)

    def _settled(self) -> Config:
        config = settle(self._config, self._cluster)
        check_memory(config, self._cluster, self._checkpoint)
        left = self._layout.num_rows - self._ledger.num_committed
        if self._config.actors == "fixed" or left < ROWS_TO_MEASURE_FOR:
            return config
        brief = {"plan_seconds": min(SECONDS_TO_MEASURE, self._config.plan_seconds)}
        measurement = measured(config.model_copy(update=brief), self._run)
        config = settle_pools(self._config, measurement, self._cluster)
        if not self._store.exists(PLAN):
            so_far_s = time.perf_counter() - self._started_s
            plan = planned(config, measurement, self._layout.num_rows, self._cluster, start_up_s=so_far_s)
            self._store.write(PLAN, plan.model_dump_json(indent=2).encode())
        return config

    def _pass(self, driver: Driver, work: Work, stop: Stop) -> None:
        brake = start_brake(pieces_on_their_way(self._config, self._layout.rows_per_unit))
        attempts = Attempts.start()
        stop.on_stop(lambda: brake.stop.remote())
        feed = Feed(work, brake, block_size(self._config, self._layout), samples(self._layout.num_rows))
        stream = answers(feed, self._config, self._cluster, attempts, self._stages)
        driver.run(work, _tables(stream), lambda piece: brake.committed.remote([piece]))
        ray.kill(brake)
        attempts.close()
        if stop.requested:
            raise Interrupted

    def _write_session(self, progress: list[tuple[float, int]], rows: int) -> None:
        session = Session(
            run_id=self._id,
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
            wall_s=round(time.perf_counter() - self._started_s, 3),
            rows=rows,
            progress=progress,
            cluster={"CPU": self._cluster.num_cpus, "GPU": self._cluster.num_gpus},
        )
        self._store.write(f"{SESSIONS}/{self._id}.json", session.model_dump_json().encode())

    def _finish(self) -> Manifest:
        for sink in self._publisher.sinks:
            sink.finish(self._store)
        manifest = self._manifest()
        write_report(manifest, self._store, gallery(self._config, self._run))
        self._store.write(MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
        self._store.write(SUCCESS, b"")
        return manifest

    def _manifest(self) -> Manifest:
        identity, tally = self._run.identity, self._ledger.tally()
        sessions = [
            Session.model_validate_json(self._store.read(name)) for name in self._store.list(SESSIONS)
        ]
        plan = Plan.model_validate_json(self._store.read(PLAN)) if self._store.exists(PLAN) else None
        return Manifest(
            run_id=identity.run_id,
            started_at=identity.started_at,
            finished_at=datetime.now(UTC),
            wall_s=round(sum(session.wall_s for session in sessions), 3),
            command=identity.command,
            configuration=self._config.model_dump(mode="json"),
            versions=identity.versions,
            model=identity.model,
            counts=tally.counts,
            duplicates=self._run.inventory.contents.num_duplicates,
            tokens=tally.tokens,
            histograms=tally.histograms,
            failures=tally.failures,
            stages=tally.stages,
            sessions=sessions,
            plan=plan,
        )


def plan_corpus(config: Config, command: str = "") -> Plan:
    """What the run would take, measured on a sample of its rows.

    The rows are listed as the run lists them, and it goes on from there: its report holds the plan against
    what happened. ``config.plan_cluster`` plans for that cluster instead, by what was measured here.
    """
    started_s = time.perf_counter()
    checked = check(config)
    store, plan_id = checked.store, f"plan-{uuid.uuid4().hex[:8]}"
    with store.lock(f"plan (process {os.getpid()} on {socket.gethostname()})"):
        run = open_run(checked.config, store, checked.checkpoint, plan_id, command)
        cluster = connect(checked.config)
        start_up_s = time.perf_counter() - started_s
        rows = run.inventory.layout.num_rows
        settled = settle(checked.config, cluster)
        measurement = measured(settled, run)
        if config.actors == "auto":
            settled = settle_pools(checked.config, measurement, cluster)
        plan = planned(settled, measurement, rows, cluster, start_up_s=start_up_s)
        store.write(PLAN, plan.model_dump_json(indent=2).encode())
    if config.plan_cluster is None:
        return plan
    named = parse_cluster(config.plan_cluster)
    settled = settle_pools(checked.config, measurement, named)
    return planned(settled, measurement, rows, named, start_up_s=start_up_s)


def dry_run(config: Config, command: str = "") -> dict[str, int]:
    """How many rows there are and how many are done, after every check that a run begins with."""
    checked = check(config)
    with checked.store.lock(f"dry run (process {os.getpid()})"):
        run = open_run(
            checked.config, checked.store, checked.checkpoint, f"dry-{uuid.uuid4().hex[:8]}", command
        )
        publisher(checked.config, run)
        cluster = connect(checked.config)
        check_memory(settle(checked.config, cluster), cluster, checked.checkpoint)
        layout = run.inventory.layout
        done = Ledger(checked.store, layout).num_committed
    return {"rows": layout.num_rows, "done": done, "output_files": layout.num_shards}


def check(config: Config) -> Checked:
    """The configuration with absolute paths; raises ConfigurationError for whatever needs no cluster.

    Nothing is written, and of a new run's input only the first rows are looked at.
    """
    config = located(config)
    checkpoint = check_model(config)
    check_columns(config.keep_columns, keep_images=config.keep_images)
    store = Store(config.output, config.storage)
    check_startable(config, store)
    return Checked(config, checkpoint, store)


def located(config: Config) -> Config:
    """The same with absolute paths: workers have other working directories."""
    paths = {name: _absolute(getattr(config, name)) for name in ("input", "output")}
    if config.model != "embedded" and Path(config.model).expanduser().is_dir():
        paths["model"] = _absolute(config.model)
    return config.model_copy(update=paths)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def check_model(config: Config) -> Path:
    """The checkpoint's folder; raises ConfigurationError for a model, policy or budget of no use."""
    checkpoint = resolve(config.model)
    families.tiling(checkpoint)
    policies.get(config.policy)
    _ = config.budget
    return checkpoint


def publisher(config: Config, run: Run) -> Publisher:
    """What writes the run's output files; raises ConfigurationError for formats or columns of no use."""
    return Publisher(
        inventory=run.inventory,
        questionnaire=run.questionnaire,
        sinks=sinks(
            config.formats,
            keep_images=config.keep_images,
            prompt_ids=[question.id for question in run.questionnaire.questions],
        ),
        keep_columns=config.keep_columns,
        constants={"model": config.model, "policy": config.policy, "run_id": run.identity.run_id},
        reading=config.reading,
    )


def measured(config: Config, run: Run) -> Measurement:
    """The stages on rows drawn evenly from the run's, in a process of the cluster that ends with it.

    Models leave memory behind, of the host and of a GPU, which the workers need.
    """
    num_gpus = 1 if config.device == "cuda" else 0
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_calls=1, max_retries=0)(_measured)
    measurement: Measurement = ray.get(task.remote(config, run))
    return measurement


def _measured(config: Config, run: Run) -> Measurement:
    return measure(config, list(sampled_batches(config, run)))


def planned(
    config: Config, measurement: Measurement, rows: int, cluster: Cluster, *, start_up_s: float
) -> Plan:
    """What so many rows take on this cluster with the workers that ``config`` settles."""
    return make_plan(
        measurement,
        rows,
        cluster,
        pools=workers(config, cluster),
        start_up_s=start_up_s,
        gpu_hour_price=config.gpu_hour_price,
    )


def pieces_on_their_way(config: Config, rows_per_unit: int) -> int:
    """Units between feeding and commit: thrice what all workers hold, so that none waits for a commit.

    A batch waits until it is full, so there must be more rows on their way than all batches take.
    """
    pools = (config.partition, config.encode, config.generate)
    held = sum((pool.max_actors or 1) * (pool.batch_size or 1) for pool in pools)
    held += (
        (config.generate.max_actors or 1)
        * config.generate.concurrent_calls
        * (config.generate.batch_size or 1)
    )
    return 4 + 3 * -(-held // rows_per_unit)


def block_size(config: Config, layout: Any) -> int:
    """Rows that travel together: few in a small corpus, so that every worker gets some."""
    share = layout.num_rows // (8 * (config.partition.max_actors or 1))
    return int(max(4, min(share, layout.rows_per_unit)))


def connect(config: Config) -> Cluster:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine alone.

    A cluster that grows may be empty still; its nodes will have whole CPUs to give.
    """
    if not ray.is_initialized():
        _initialise(os.environ.get("RAY_ADDRESS", "local"))
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = False  # columns have types; never pickle them
    context.enable_progress_bars = False  # the run has its own
    context.execution_no_progress_timeout_s = config.start_timeout_s + config.batch_timeout_s
    resources = ray.cluster_resources()
    num_cpus = max(resources.get("CPU", 0), 4 if config.autoscaling else 0)
    return Cluster(num_cpus, resources.get("GPU", 0), resources.get("memory", math.inf))


def _initialise(address: str) -> None:
    if address == "local":
        # Workers start elsewhere; let them find this package where the driver did, installed or not.
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        ray.init(address=address, include_dashboard=False)
        return
    try:
        ray.init(address=address)
    except ConnectionError as error:
        raise ConfigurationError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS"
        ) from error


def _tables(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Without the columns of nothing that empty blocks have."""
    return (table for table in stream if table.num_rows)


def _remotely(publisher: Publisher, shard: int, pieces: list[str], before: ShardRecord | None) -> ShardRecord:
    """Publish in a task of the cluster, which reads the images anew."""
    task = ray.remote(here).options(num_cpus=0)
    record: ShardRecord = ray.get(task.remote(publisher, shard, pieces, before))
    return record
