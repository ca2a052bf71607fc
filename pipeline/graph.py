"""The dataset graph on one page.

inventory -> read -> PartitionStage -> EncodeStage -> GenerateStage -> captions | dead letters
             tasks   actors, CPU       actors, GPU    actors, GPU      tasks
"""

from __future__ import annotations

import warnings
from typing import Any

import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipeline.config import Config, Pool
from pipeline.reading import ReadStage
from pipeline.resources import Cluster
from pipeline.sinks import CaptionSink
from pipeline.sources import Inventory
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage

# An image that kills its worker would otherwise be tried for ever. Workers themselves restart without limit.
MAX_TASK_RETRIES = 3


def run_graph(inventory: Inventory, config: Config, cluster: Cluster, sink: CaptionSink) -> None:
    """Run every row of the inventory through the three stages into the sink."""
    rows = ray.data.from_arrow(inventory.tables())
    images = rows.map_batches(
        ReadStage(config).__call__, batch_size=None, batch_format="numpy", num_cpus=cluster.task_cpus
    )
    partitions = _mapped(images, PartitionStage, config.partition, config)
    tokens = _mapped(partitions, EncodeStage, config.encode, config)
    captions = _mapped(tokens, GenerateStage, config.generate, config, config.generate.concurrent_calls)
    captions.write_datasink(sink, ray_remote_args={"num_cpus": cluster.task_cpus})


def _mapped(dataset: Any, stage: type, pool: Pool, config: Config, concurrent_calls: int = 1) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # max_task_retries has no successor yet
        return dataset.map_batches(
            stage,
            fn_constructor_args=(config,),
            batch_size=pool.batch_size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.min_actors,
                max_size=pool.max_actors,
                max_concurrent_calls_per_actor=concurrent_calls,
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            udf_modifying_row_count=False,
            max_task_retries=MAX_TASK_RETRIES,
        )
