"""Which workers run where: what the configuration leaves open is settled from the cluster's size.

Ray waits for ever, without an error, when the pools reserve so much that reading or writing never gets a CPU.
So the sum is taken before the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hired.errors import ConfigurationError
from hired.families.checkpoint import num_parameters
from pipeline.config import Config, Pool

# Of one GPU: the tower is small and fast, the language model is neither.
ENCODE_GPU_SHARE, GENERATE_GPU_SHARE = 0.3, 0.7
# What a worker of any stage holds besides a model: measured on jobs with a model of no size.
WORKER_BYTES = 500 * 2**20
BYTES_A_WEIGHT = {"int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the nodes offer together."""

    num_cpus: float
    num_gpus: float = 0
    memory_bytes: float = math.inf

    @property
    def cpu_share(self) -> float:
        """CPUs for one worker: a whole one from four CPUs on, a quarter of all below."""
        return min(1.0, self.num_cpus / 4)

    @property
    def task_cpus(self) -> float:
        """CPUs for one task that reads or writes; such tasks mostly wait."""
        return self.cpu_share / 2


def settle(config: Config, cluster: Cluster) -> Config:
    """The configuration with every open device and pool decided; raises ConfigurationError if it cannot run.

    With GPUs each one carries an encode and a generate worker. Without, half the CPUs but one generate, an
    eighth encode, and the rest partitions.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if cluster.num_gpus else "cpu"
    models = _on_gpus(config, cluster) if device == "cuda" else _on_cpus(config, cluster)
    settled = config.model_copy(update={"device": device, **models})
    settled = settled.model_copy(update={"partition": _partition_pool(settled, cluster)})
    if not config.autoscaling:
        _check(settled, cluster)
    return settled


def _on_gpus(config: Config, cluster: Cluster) -> dict[str, Pool]:
    num_gpus = max(1, int(cluster.num_gpus))
    return {
        "encode": _settled(config.encode, num_gpus, cluster.cpu_share, ENCODE_GPU_SHARE),
        "generate": _settled(config.generate, num_gpus, cluster.cpu_share, GENERATE_GPU_SHARE, 256),
    }


def _on_cpus(config: Config, cluster: Cluster) -> dict[str, Pool]:
    cores = int(cluster.num_cpus)
    return {
        "encode": _settled(config.encode, 1, max(cluster.cpu_share, cores // 8), 0.0),
        "generate": _settled(config.generate, 1, max(cluster.cpu_share, cores // 2 - 1), 0.0, 32),
    }


def _partition_pool(config: Config, cluster: Cluster) -> Pool:
    """As many workers as the CPUs that the other pools leave allow."""
    share = config.partition.num_cpus or cluster.cpu_share
    left = (
        cluster.num_cpus
        - 2 * cluster.task_cpus
        - sum(_cpus(pool) for pool in (config.encode, config.generate))
    )
    return _settled(config.partition, int(left / share + 1e-9), share, 0.0)


def _settled(
    pool: Pool, max_actors: int, num_cpus: float, num_gpus: float, batch_size: int | None = None
) -> Pool:
    """The pool with these values where it leaves them open."""
    cpus = pool.num_cpus if pool.num_cpus is not None else num_cpus
    update: dict[str, Any] = {
        "max_actors": pool.max_actors or max(pool.min_actors, max_actors),
        "num_cpus": cpus,
        "num_gpus": pool.num_gpus if pool.num_gpus is not None else num_gpus,
        "threads": pool.threads or max(1, int(cpus)),
        "batch_size": pool.batch_size or batch_size,
    }
    return pool.model_copy(update=update)


def _cpus(pool: Pool) -> float:
    return (pool.max_actors or 1) * (pool.num_cpus or 0)


def _gpus(pool: Pool) -> float:
    return (pool.max_actors or 1) * (pool.num_gpus or 0)


def _check(config: Config, cluster: Cluster) -> None:
    pools = config.pools
    cpus = sum(map(_cpus, pools.values())) + 2 * cluster.task_cpus
    gpus = sum(map(_gpus, pools.values()))
    for kind, needed, there in (("CPUs", cpus, cluster.num_cpus), ("GPUs", gpus, cluster.num_gpus)):
        if needed > there + 1e-9:
            shares = ", ".join(
                f"{name} {pool.max_actors} x {pool.num_cpus if kind == 'CPUs' else pool.num_gpus:g}"
                for name, pool in pools.items()
            )
            raise ConfigurationError(
                f"the workers need {needed:g} {kind} and the cluster has {there:g} ({shares}; reading and "
                f"writing take {2 * cluster.task_cpus:g} CPUs): lower --encode.max-actors, "
                f"--encode.num-{kind.lower()} and the like, or say --autoscaling if nodes will join"
            )


def check_memory(config: Config, cluster: Cluster, checkpoint: Path) -> None:
    """Raises ConfigurationError when the settled workers cannot all be in the nodes' memory.

    Key-value caches come on top, and take what is left. On GPUs weights only pass through the hosts' memory,
    and each worker says at its start whether its GPU has room for them.
    """
    workers = sum(pool.max_actors or 1 for pool in config.pools.values()) * WORKER_BYTES
    precision = 4.0 if config.dtype in ("auto", "float32") else 2.0
    a_weight = BYTES_A_WEIGHT.get(config.engine.quantisation, precision)
    models = (config.generate.max_actors or 1) * num_parameters(checkpoint) * a_weight
    needed = workers + (models if config.device == "cpu" else 0.0)
    if not config.autoscaling and needed > cluster.memory_bytes:
        raise ConfigurationError(
            f"the workers need {needed / 2**30:.1f} GiB of memory ({models / 2**30:.1f} GiB of them for "
            f"weights) and the cluster has {cluster.memory_bytes / 2**30:.1f}: lower "
            "--generate.max-actors, say --engine.quantisation int8 or --dtype bfloat16, or add nodes"
        )
