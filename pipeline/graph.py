"""The dataset graph on one page.

inventory -> feed -> ReadStage -> PartitionStage -> EncodeStage -> GenerateStage -> answers, to the driver
             a task  actors, CPU  actors, CPU       actors, GPU    actors, GPU
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipeline.balance import workers
from pipeline.config import Config, Pool
from pipeline.feeding import BLOCK_BYTES, Feed
from pipeline.guard import Guarded
from pipeline.resources import Cluster
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage, ReadStage

# A node that goes takes a batch with it, as a deadly row does; the guard finds the latter out and lets it go.
MAX_TASK_RETRIES = -1


@dataclass(frozen=True)
class Stages:
    """The classes that the workers run."""

    read: type = ReadStage
    partition: type = PartitionStage
    encode: type = EncodeStage
    generate: type = GenerateStage


def answers(
    feed: Feed, config: Config, cluster: Cluster, attempts: Any, stages: Stages
) -> Generator[pa.Table]:
    """Run what is fed through the stages; answers come in any order, as they are done."""
    ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
    # Without a number of blocks Ray Data cuts what each task reads into 200.
    rows = ray.data.read_datasource(feed, concurrency=1, num_cpus=0, override_num_blocks=feed.num_tasks)
    images = _read(rows, stages.read, config, cluster)
    partitions = _mapped(images, stages.partition, config.partition, config, attempts)
    tokens = _mapped(partitions, stages.encode, config.encode, config, attempts)
    captions = _mapped(
        tokens, stages.generate, config.generate, config, attempts, config.generate.concurrent_calls
    )
    yield from captions.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read(dataset: Any, stage: type, config: Config, cluster: Cluster) -> Any:
    """By actors: a node whose CPUs are all given away ends idle processes of tasks after a second.

    One reads for several that partition, even from afar; so few more than the CPUs left over hinder nobody.
    """
    left_over = workers(config, cluster)["read"].actors
    most = None if config.autoscaling else max(left_over, (config.partition.max_actors or 1) // 4)
    return _by_actors(
        dataset,
        stage,
        config,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=cluster.task_cpus,
    )


def _mapped(
    dataset: Any, stage: type, pool: Pool, config: Config, attempts: Any, concurrent_calls: int = 1
) -> Any:
    return _by_actors(
        dataset,
        type(stage.__name__, (Guarded,), {}),  # the name that Ray shows
        stage,
        config,
        attempts,
        config.batch_timeout_s,
        batch_size=pool.batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            max_concurrent_calls_per_actor=concurrent_calls,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )


def _by_actors(dataset: Any, worker: type, *arguments: Any, **options: Any) -> Any:
    """The dataset through actors of this class, made with these arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # max_task_retries has no successor yet
        return dataset.map_batches(
            worker, fn_constructor_args=arguments, max_task_retries=MAX_TASK_RETRIES, **options
        )
