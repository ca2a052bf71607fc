"""The Ray cluster that a run works on: the one that is named, or one of its own."""

from __future__ import annotations

import math
import os
from pathlib import Path

import ray

from hired.errors import ConfigurationError
from pipeline.config import Config
from pipeline.resources import Cluster


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
