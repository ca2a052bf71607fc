"""A captioning run from configuration to manifest."""

from __future__ import annotations

import logging
import os
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import ray

from hired import families, policies
from hired.errors import ConfigurationError
from hired.vlm import resolve
from pipeline.config import Config
from pipeline.graph import run_graph
from pipeline.manifest import Manifest, fingerprint, versions
from pipeline.report import account, write_report
from pipeline.resources import Cluster, settle
from pipeline.sinks import CaptionSink, check_output, fill_up, prepare_output
from pipeline.sources import take_inventory

# Loading a large checkpoint, or waiting for a node that joins, is no progress either.
NO_PROGRESS_TIMEOUT_S = 2 * 3600

log = logging.getLogger(__name__)


def caption_corpus(config: Config) -> Manifest:
    """Caption every image of ``config.input`` into ``config.output``.

    Everything that can be wrong with the configuration raises ConfigurationError before a worker starts.
    """
    started_at, started_s = datetime.now(UTC), time.perf_counter()
    run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    config = located(config)
    check_output(config.output)
    checkpoint = check_model(config)
    inventory = take_inventory(config.input, config.image_column)
    log.info("%d rows in %s", len(inventory), config.input)
    cluster = connect(config.autoscaling)
    config = settle(config, cluster)
    prepare_output(config.output)

    sink = CaptionSink(config, run_id)
    run_graph(inventory, config, cluster, sink)

    fill_up(config.output)
    counts, tokens = account(config.output, (item.key for item in inventory.items()))
    manifest = Manifest(
        run_id=run_id,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        wall_s=round(time.perf_counter() - started_s, 3),
        configuration=config.model_dump(mode="json"),
        versions=versions(),
        model=fingerprint(config.model, checkpoint),
        cluster={"CPU": cluster.num_cpus, "GPU": cluster.num_gpus},
        counts=counts,
        tokens=tokens,
        stages=sink.costs,
    )
    write_report(manifest, config.output)
    manifest.write(config.output)
    return manifest


def located(config: Config) -> Config:
    """The same with absolute paths: workers have other working directories."""
    paths = {name: _absolute(getattr(config, name)) for name in ("input", "output")}
    if config.model != "embedded" and Path(config.model).expanduser().is_dir():
        paths["model"] = _absolute(config.model)
    return config.model_copy(update=paths | {"output": Path(paths["output"])})


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def check_model(config: Config) -> Path:
    """The checkpoint's folder; raises ConfigurationError for a model, policy or budget of no use."""
    checkpoint = resolve(config.model)
    families.tiling(checkpoint)
    policies.get(config.policy)
    _ = config.budget
    return checkpoint


def connect(autoscaling: bool) -> Cluster:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine alone.

    A cluster that grows may be empty still; its nodes will have whole CPUs to give.
    """
    if not ray.is_initialized():
        _initialise(os.environ.get("RAY_ADDRESS", "local"))
    os.environ.setdefault("RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL", "30")
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = False  # columns have types; never pickle them
    context.enable_rich_progress_bars, context.use_ray_tqdm = True, False  # drawn on stderr
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    resources = ray.cluster_resources()
    num_cpus = max(resources.get("CPU", 0), 4 if autoscaling else 0)
    return Cluster(num_cpus=num_cpus, num_gpus=resources.get("GPU", 0))


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
