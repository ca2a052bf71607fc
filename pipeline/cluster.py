"""The Ray cluster that a run works on: the one that is named, or one of its own."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import ray

from hired.errors import ConfigurationError
from pipeline.config import Config
from pipeline.resources import Cluster


def connect(config: Config) -> Cluster:
    """The cluster of ``join``, with Ray Data set up for the run.

    A cluster that grows may be empty still; its nodes will have whole CPUs to give.
    """
    join()
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = False  # columns have types; never pickle them
    context.enable_progress_bars = False  # the run has its own
    context.execution_no_progress_timeout_s = config.start_timeout_s + config.batch_timeout_s
    resources = ray.cluster_resources()
    num_cpus = max(resources.get("CPU", 0), 4 if config.autoscaling else 0)
    return Cluster(num_cpus, resources.get("GPU", 0), resources.get("memory", math.inf))


def join() -> None:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine alone, unless that is done.

    Raises ConfigurationError where no cluster answers.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if ray.is_initialized():
        return
    if address == "local":
        start()
        return
    try:
        ray.init(address=address)
    except ConnectionError as error:
        raise ConfigurationError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS"
        ) from error


def start(**options: Any) -> None:
    """Ray on this machine alone; ``options`` are more of ``ray.init``."""
    os.environ["PYTHONPATH"] = python_path()
    ray.init(address="local", include_dashboard=False, **options)


def python_path() -> str:
    """PYTHONPATH by which a new process finds this package where this one did, installed or not."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return os.pathsep.join(filter(None, paths))
