"""Planning a run: its stages measured on a sample, then the whole pipeline tried for a while.

    sample --measured--> Measurement --settle_pools--> pools --tried--> Trial --make_plan--> Plan

Nothing that is tried is committed. The measurement stays with the run, which sizes its pools by it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Sequence

import ray

from pipeline.balance import Measurement, limits, settle_pools, workers
from pipeline.checking import check
from pipeline.cluster import connect
from pipeline.config import Config
from pipeline.flow import flowing, pieces_on_their_way
from pipeline.graph import Stages
from pipeline.measurement import measure
from pipeline.opening import Run, open_run
from pipeline.plan import Plan, Trial, make_plan, parse_cluster
from pipeline.resources import Cluster, check_memory, settle
from pipeline.samples import sampled_batches
from pipeline.storage import Store
from pipeline.tally import Record
from pipeline.work import Gatherer, UnitWork

MEASURED, PLAN = "_work/measured.json", "_work/plan.json"
# The first answers of a trial come while the pipeline still fills; the rate is that of the later part.
FILLING = 0.4

log = logging.getLogger(__name__)


class Measured(Record):
    """A measurement, and the cluster on which it was made."""

    num_cpus: float
    num_gpus: float
    measurement: Measurement


def plan_corpus(config: Config, command: str = "", stages: Stages | None = None) -> Plan:
    """What the run would take, measured and tried on a sample of its rows.

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
        settled = settle(checked.config, cluster)
        check_memory(settled, cluster, checked.checkpoint)
        measurement = measured(settled, run, cluster)
        if config.actors == "auto":
            settled = settle_pools(checked.config, measurement, cluster)
        tried_here = tried(settled, run, cluster, measurement, stages or Stages())

        def plan(config: Config, cluster: Cluster) -> Plan:
            return make_plan(
                measurement,
                run.inventory.layout.num_rows,
                cluster,
                pools=workers(config, cluster),
                trial=tried_here,
                start_up_s=start_up_s,
                gpu_hour_price=config.gpu_hour_price,
            )

        here = plan(settled, cluster)
        store.write(PLAN, here.model_dump_json(indent=2).encode())
    if config.plan_cluster is None:
        return here
    named = parse_cluster(config.plan_cluster)
    return plan(settle_pools(checked.config, measurement, named), named)


def measured(config: Config, run: Run, cluster: Cluster) -> Measurement:
    """The stages on rows drawn evenly from the run's, in a process of the cluster that ends with it.

    Models leave memory behind, of the host and of a GPU, which the workers need.
    """
    num_gpus = 1 if config.device == "cuda" else 0
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_calls=1, max_retries=0)(_measured)
    measurement: Measurement = ray.get(task.remote(config, run))
    kept = Measured(num_cpus=cluster.num_cpus, num_gpus=cluster.num_gpus, measurement=measurement)
    run.store.write(MEASURED, kept.model_dump_json(indent=2).encode())
    return measurement


def _measured(config: Config, run: Run) -> Measurement:
    return measure(config, list(sampled_batches(config, run)))


def measured_before(config: Config, store: Store, cluster: Cluster) -> Measurement | None:
    """What was measured for this run on such a cluster and with workers like these, if anything was."""
    if not store.exists(MEASURED):
        return None
    kept = Measured.model_validate_json(store.read(MEASURED))
    same_workers = all(
        (stage.on_gpu, stage.batch_size, stage.threads)
        == (config.device == "cuda" and name != "partition", pool.batch_size, pool.threads or 1)
        for name, pool in config.pools.items()
        for stage in [kept.measurement.stages[name]]
    )
    same_cluster = (kept.num_cpus, kept.num_gpus) == (cluster.num_cpus, cluster.num_gpus)
    return kept.measurement if same_workers and same_cluster else None


def tried(
    config: Config, run: Run, cluster: Cluster, measurement: Measurement, stages: Stages
) -> Trial | None:
    """The pipeline on units drawn evenly from the run's, for ``config.plan_seconds`` from its first answers.

    None where the run is over before it can tell a rate.
    """
    layout = run.inventory.layout
    bound = min(limits(measurement, workers(config, cluster), cluster).values())
    num_units = math.ceil(2 * bound * config.plan_seconds / layout.rows_per_unit)
    num_units += pieces_on_their_way(config, layout.rows_per_unit)
    units = range(0, layout.num_units, max(1, layout.num_units // num_units))
    log.info("trying the pipeline on up to %d rows", len(units) * layout.rows_per_unit)
    arrivals = _arrivals(UnitWork(run.inventory, run.questionnaire, [units]), config, cluster, stages)
    return trial(arrivals, bound)


def _arrivals(work: UnitWork, config: Config, cluster: Cluster, stages: Stages) -> list[tuple[float, float]]:
    """Seconds from the start, and the rows whose answers came then."""
    gatherer, arrivals = Gatherer(work), list[tuple[float, float]]()
    started_s = time.perf_counter()
    with flowing(work, config, cluster, stages) as flow:
        for table in flow.answers:
            now_s = time.perf_counter() - started_s
            arrivals.append((now_s, table.num_rows / len(work.questionnaire)))
            for piece, _ in gatherer.add(table):
                flow.committed(piece)
            if now_s >= arrivals[0][0] + config.plan_seconds:
                break
    return arrivals


def trial(arrivals: Sequence[tuple[float, float]], bound: float) -> Trial | None:
    """What answers that came at these seconds tell, once the pipeline was full; None if that is nothing."""
    if not arrivals:
        return None
    first_s, last_s = arrivals[0][0], arrivals[-1][0]
    begins_s = next(seconds for seconds, _ in arrivals if seconds >= first_s + FILLING * (last_s - first_s))
    rows = sum(count for seconds, count in arrivals if seconds > begins_s)
    if not rows:
        return None
    return Trial(rows=rows, seconds=last_s - begins_s, first_rows_s=first_s, bound=bound)
