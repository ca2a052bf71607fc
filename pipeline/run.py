"""A captioning run from configuration to manifest."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from datetime import UTC, datetime

import ray

from pipeline.balance import settle_pools
from pipeline.checking import Checked, check
from pipeline.cluster import connect
from pipeline.config import Config
from pipeline.driving import Driver, Stop, check_complete, here, stopped_by_signals
from pipeline.flow import flowing
from pipeline.graph import Stages
from pipeline.ledger import Ledger, ShardRecord
from pipeline.manifest import MANIFEST, Manifest, Session
from pipeline.opening import SUCCESS, Run, open_run
from pipeline.plan import Plan
from pipeline.planning import PLAN, measured, measured_before
from pipeline.progress import Progress
from pipeline.publishing import Publisher
from pipeline.report import write_report
from pipeline.resources import Cluster, check_memory, settle
from pipeline.samples import gallery
from pipeline.sinks import sinks
from pipeline.work import RetryWork, UnitWork, Work

SESSIONS = "_work/sessions"
# Smaller corpora are done before a measurement of the stages pays; it takes this long a stage.
ROWS_TO_MEASURE_FOR, SECONDS_TO_MEASURE = 5_000, 10.0
# How often rows that never came back are fed again before the run gives up.
MAX_PASSES = 3

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to end, and can go on from where it is."""


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
        measurement = measured_before(config, self._store, self._cluster)
        if measurement is None:
            brief = {"plan_seconds": min(SECONDS_TO_MEASURE, self._config.plan_seconds)}
            measurement = measured(config.model_copy(update=brief), self._run, self._cluster)
        return settle_pools(self._config, measurement, self._cluster)

    def _pass(self, driver: Driver, work: Work, stop: Stop) -> None:
        with flowing(work, self._config, self._cluster, self._stages) as flow:
            stop.on_stop(flow.stop)
            driver.run(work, flow.answers, flow.committed)
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


def _remotely(publisher: Publisher, shard: int, pieces: list[str], before: ShardRecord | None) -> ShardRecord:
    """Publish in a task of the cluster, which reads the images anew."""
    task = ray.remote(here).options(num_cpus=0)
    record: ShardRecord = ray.get(task.remote(publisher, shard, pieces, before))
    return record
