"""How many workers of each stage a cluster should run: the stages' measured seconds in, pools out.

Nothing here runs or measures anything. Two laws bound a pipeline's rate, in rows a second:

- a stage gives no more than its workers together: ``workers / seconds a row``;
- stages that share cores or GPUs give no more than all of them together: ``CPUs / sum of CPU seconds a row``,
  and ``GPUs / sum of GPU seconds a row``. On few cores this one binds, and no number of workers helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import Field

from hired.errors import ConfigurationError
from pipeline.config import Config, Pool
from pipeline.resources import ENCODE_GPU_SHARE, GENERATE_GPU_SHARE, Cluster, settle
from pipeline.tally import Record

STAGES = ("read", "partition", "encode", "generate")
POOLS = STAGES[1:]
CPUS, GPUS = "CPUs", "GPUs"

# Beyond so many threads a worker on CPUs gains little; a second worker does, and it finds room on any node.
MAX_THREADS = 8
# A worker that shares its GPU with an ever busy one gets about half its time.
SHARED_GPU = 0.5
# Ray may let the partition pool grow by so much beyond what the sample asked for.
PARTITION_HEADROOM = 1.5
# Rounding must not turn 3.0000000001 workers into four.
EPSILON = 1e-9


class StageMeasurement(Record):
    """What a row costs one worker of a stage, on a sample of the corpus.

    ``seconds`` is wall time a row in a worker with ``threads`` threads, ``cpu_s`` the CPU time of all its
    threads and processes; ``handoff_s`` (also CPU) what turning its rows into Arrow and back takes, which
    Ray does around every call. ``bytes`` are those of the row that it hands on, ``load_s`` what its start
    takes.
    """

    rows: int
    calls: int
    seconds: float = Field(gt=0)
    fastest_s: float
    slowest_s: float
    cpu_s: float
    handoff_s: float = 0.0
    bytes: float = 0.0
    batch_size: int = 1
    threads: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    on_gpu: bool = False
    gpu_memory_share: float = 0.0
    load_s: float = 0.0

    @property
    def worker_s(self) -> float:
        """Wall seconds a row keeps a worker."""
        return self.seconds + self.handoff_s

    @property
    def all_cpu_s(self) -> float:
        """CPU seconds a row takes on its node."""
        return self.cpu_s + self.handoff_s


class Measurement(Record):
    """What rows of the sample took in each stage, and what came of them, a row.

    ``visual_full`` and ``visual_kept`` are tokens of one prompt, ``completion_tokens`` those of all answers
    to a row, and ``failures`` is the share of answers that were failures. ``import_s`` is what a worker takes
    before it loads its model.
    """

    rows: int
    stages: dict[str, StageMeasurement]
    visual_full: float
    visual_kept: float
    completion_tokens: float
    failures: float = 0.0
    import_s: float = 0.0

    @property
    def on_gpu(self) -> bool:
        return any(stage.on_gpu for stage in self.stages.values())

    @property
    def cpu_s(self) -> float:
        """CPU seconds a row takes in all stages."""
        return sum(stage.all_cpu_s for stage in self.stages.values())

    @property
    def gpu_s(self) -> float:
        """GPU seconds a row takes, as if no two stages on a GPU ever overlapped."""
        return sum(stage.seconds * max(1.0, stage.num_gpus) for stage in self.stages.values() if stage.on_gpu)


@dataclass(frozen=True, slots=True)
class Workers:
    """A pool: so many workers, and what each one holds. Reading is done by tasks, which count alike."""

    actors: int
    num_cpus: float
    num_gpus: float = 0.0
    threads: int = 1


Pools = Mapping[str, Workers]


def workers(config: Config, cluster: Cluster) -> dict[str, Workers]:
    """The pools of a settled configuration at their largest; readers get the CPUs that these leave."""
    pools = {
        name: Workers(pool.max_actors or 1, pool.num_cpus or 0.0, pool.num_gpus or 0.0, pool.threads or 1)
        for name, pool in config.pools.items()
    }
    left = cluster.num_cpus - sum(pool.actors * pool.num_cpus for pool in pools.values())
    return {"read": Workers(max(1, _floor(left / cluster.task_cpus)), cluster.task_cpus), **pools}


def limits(measurement: Measurement, pools: Pools, cluster: Cluster) -> dict[str, float]:
    """Rows a second that each stage, the CPUs and the GPUs allow; the pipeline gives the least of them."""
    rates = {
        name: pools[name].actors * worker_rate(stage, pools[name].threads)
        for name, stage in measurement.stages.items()
    }
    shared = {
        CPUS: _rate(measurement.cpu_s) * cluster.num_cpus,
        GPUS: _rate(measurement.gpu_s) * cluster.num_gpus,
    }
    return rates | (shared if measurement.on_gpu else {CPUS: shared[CPUS]})


def worker_rate(stage: StageMeasurement, threads: int) -> float:
    """Rows a second of one worker; on CPUs it is taken to grow with its threads, which flatters many."""
    speed = 1.0 if stage.on_gpu else threads / stage.threads
    return 1 / (stage.seconds / speed + stage.handoff_s)


def needed(stage: StageMeasurement, threads: int, rate: float) -> int:
    """The fewest workers that keep up with so many rows a second."""
    return max(1, math.ceil(rate / worker_rate(stage, threads) - EPSILON))


def balanced(measurement: Measurement, cluster: Cluster, given: Mapping[str, Pool] | None = None) -> Pools:
    """The pools with which the cluster is fastest, no larger than they need be; ``given`` values stay.

    Raises ConfigurationError when what was measured needs GPUs and the cluster has none.
    """
    given = given or {}
    if measurement.on_gpu:
        if cluster.num_gpus < 1:
            raise ConfigurationError(
                f"the stages were measured on a GPU and the cluster has {cluster.num_gpus:g}: name one with "
                "GPUs, such as '64 CPU, 8 GPU', or measure with --device cpu"
            )
        return _on_gpus(measurement, cluster, given)
    return _on_cpus(measurement, cluster, given)


def settle_pools(config: Config, measurement: Measurement, cluster: Cluster) -> Config:
    """The configuration settled by measurement; what it gave of its own stays.

    ``config`` is the one before ``resources.settle``, whose rules decide all that is no matter of speed.
    Workers that load a model all start at once; the partition pool starts balanced and may grow.
    Raises ConfigurationError as ``resources.settle`` does.
    """
    given = config.pools
    pools = balanced(measurement, cluster, given)
    chosen: dict[str, Pool] = {}
    for name, pool in given.items():
        own = pools[name]
        update: dict[str, object] = {
            "num_cpus": own.num_cpus,
            "num_gpus": own.num_gpus,
            "threads": own.threads,
        }
        update["max_actors"] = pool.max_actors or max(own.actors, pool.min_actors)
        if name == "partition" and pool.max_actors is None:
            update["max_actors"] = max(pool.min_actors, _grown(pools, cluster))
        # Ray packs fractions: encode workers that all started first would sit on one GPU, and a generate
        # worker would find none. One of them starts, the generate workers take a GPU each, the rest follow.
        if "min_actors" not in pool.model_fields_set and not config.autoscaling and not _shares(name, pools):
            update["min_actors"] = min(own.actors, pool.max_actors or own.actors)
        chosen[name] = pool.model_copy(update=update)
    return settle(config.model_copy(update=chosen), cluster)


def _shares(name: str, pools: Pools) -> bool:
    return name == "encode" and 0 < pools["encode"].num_gpus < 1 and pools["generate"].num_gpus > 0


def _grown(pools: Pools, cluster: Cluster) -> int:
    """Partition workers at most: some more than needed, within what readers and models leave."""
    own = pools["partition"]
    others = sum(pool.actors * pool.num_cpus for name, pool in pools.items() if name != "partition")
    room = _floor((cluster.num_cpus - max(others, _reserved(cluster) + _models(pools))) / own.num_cpus)
    return max(own.actors, min(room, math.ceil(own.actors * PARTITION_HEADROOM)))


def _models(pools: Pools) -> float:
    return sum(pools[name].actors * pools[name].num_cpus for name in ("encode", "generate"))


def _reserved(cluster: Cluster) -> float:
    """What ``settle`` keeps free for tasks, whatever reading needs."""
    return 2 * cluster.task_cpus


def _on_gpus(measurement: Measurement, cluster: Cluster, given: Mapping[str, Pool]) -> Pools:
    encode, generate = _gpu_workers(measurement, cluster, given)
    num_encoders = given["encode"].max_actors if "encode" in given else None
    most = max(1, int(cluster.num_gpus))
    best: tuple[float, dict[str, Workers]] | None = None
    for count in [num_encoders] if num_encoders else range(1, most + 1):
        fits = _generators(int(cluster.num_gpus), replace(encode, actors=count), generate)
        asked = given["generate"].max_actors if "generate" in given else None
        # A fleet of GPUs with few CPUs runs fewer workers, so that one can still partition.
        for generators in [asked] if asked else range(fits, 0, -1):
            pools = {
                "encode": replace(encode, actors=count),
                "generate": replace(generate, actors=generators),
            }
            fed = _fed(measurement, cluster, pools, given)
            if fed is not None:
                rate = _gpu_rate(measurement, fed, cluster)
                if best is None or rate > best[0] * (1 + EPSILON):
                    best = (rate, fed)
                break
    if best is None:  # nothing fits: let ``settle`` say which shares are too large
        return {
            "encode": replace(encode, actors=num_encoders or 1),
            "generate": generate,
            "partition": _partitioner(measurement, cluster, given),
            "read": Workers(1, cluster.task_cpus),
        }
    return best[1]


def _gpu_workers(
    measurement: Measurement, cluster: Cluster, given: Mapping[str, Pool]
) -> tuple[Workers, Workers]:
    """One encode and one generate worker. An encoder that needs little memory leaves it to the cache."""
    needs = measurement.stages["encode"].gpu_memory_share
    share = min(ENCODE_GPU_SHARE, max(0.1, math.ceil(needs * 20 + 1) / 20)) if needs else ENCODE_GPU_SHARE
    rest = GENERATE_GPU_SHARE if share == ENCODE_GPU_SHARE else round(1 - share, 2)
    return (
        _one(given.get("encode"), cluster.cpu_share, share),
        _one(given.get("generate"), cluster.cpu_share, rest),
    )


def _one(pool: Pool | None, num_cpus: float, num_gpus: float) -> Workers:
    cpus = pool.num_cpus if pool and pool.num_cpus is not None else num_cpus
    gpus = pool.num_gpus if pool and pool.num_gpus is not None else num_gpus
    return Workers(1, cpus, gpus, (pool.threads if pool else None) or max(1, int(cpus)))


def _generators(num_gpus: int, encode: Workers, generate: Workers) -> int:
    """Generate workers that fit beside the encode workers, in whatever order Ray places them."""
    if encode.num_gpus + generate.num_gpus <= 1 + EPSILON and encode.actors <= num_gpus:
        return num_gpus
    if encode.num_gpus > 1:
        taken = encode.actors * math.ceil(encode.num_gpus)
    else:
        taken = math.ceil(encode.actors / _floor(1 / encode.num_gpus)) if encode.num_gpus else 0
    if generate.num_gpus > 1:
        return max(0, (num_gpus - taken) // math.ceil(generate.num_gpus))
    return max(0, (num_gpus - taken) * (_floor(1 / generate.num_gpus) if generate.num_gpus else 1))


def _gpu_rate(measurement: Measurement, pools: Pools, cluster: Cluster) -> float:
    rates = limits(measurement, pools, cluster)
    if _shares("encode", pools) and pools["encode"].num_gpus + pools["generate"].num_gpus <= 1 + EPSILON:
        rates["encode"] *= SHARED_GPU
    return min(rates.values())


def _on_cpus(measurement: Measurement, cluster: Cluster, given: Mapping[str, Pool]) -> Pools:
    """Cores in proportion to what the stages take of them, at least one worker of each."""
    room = cluster.num_cpus - _reserved(cluster)
    if cluster.num_cpus <= 4:  # nothing to choose: each stage's one worker has a quarter
        pools = {name: _one(given.get(name), cluster.cpu_share, 0.0) for name in ("encode", "generate")}
        for name in pools:
            pools[name] = replace(pools[name], actors=_count(given.get(name), 1))
    else:
        pools = {
            name: _share_of_cores(measurement, name, room, cluster, given.get(name))
            for name in ("encode", "generate")
        }
        pools = _shrunk(pools, room - _partitioner(measurement, cluster, given).num_cpus, given)
    return _fed(measurement, cluster, pools, given) or {
        **pools,
        "partition": _partitioner(measurement, cluster, given),
        "read": Workers(1, cluster.task_cpus),
    }


def _share_of_cores(
    measurement: Measurement, name: str, room: float, cluster: Cluster, pool: Pool | None
) -> Workers:
    busy = sum(measurement.stages[name].all_cpu_s for name in POOLS)
    cores = max(1, round(room * measurement.stages[name].all_cpu_s / busy)) if busy else 1
    if pool and pool.num_cpus is not None:
        own = _one(pool, cluster.cpu_share, 0.0)
        return replace(own, actors=_count(pool, max(1, _floor(cores / own.num_cpus))))
    actors = _count(pool, math.ceil(cores / MAX_THREADS))
    return replace(_one(pool, float(max(1, cores // actors)), 0.0), actors=actors)


def _count(pool: Pool | None, default: int) -> int:
    return (pool.max_actors if pool else None) or default


def _shrunk(pools: dict[str, Workers], room: float, given: Mapping[str, Pool]) -> dict[str, Workers]:
    """Where rounding up took more cores than there are, a core less for the largest worker that is free."""
    while sum(pool.actors * pool.num_cpus for pool in pools.values()) > room + EPSILON:
        free = [
            name
            for name, pool in pools.items()
            if pool.num_cpus >= 2 and (name not in given or given[name].num_cpus is None)
        ]
        if not free:
            return pools
        largest = max(free, key=lambda name: pools[name].actors * pools[name].num_cpus)
        own = pools[largest]
        chosen = given.get(largest)
        threads = (chosen.threads if chosen else None) or int(own.num_cpus) - 1
        pools = {**pools, largest: replace(own, num_cpus=own.num_cpus - 1, threads=threads)}
    return pools


def _partitioner(measurement: Measurement, cluster: Cluster, given: Mapping[str, Pool]) -> Workers:
    return _one(given.get("partition"), cluster.cpu_share, 0.0)


def _fed(
    measurement: Measurement, cluster: Cluster, pools: Mapping[str, Workers], given: Mapping[str, Pool]
) -> dict[str, Workers] | None:
    """With the partition workers and readers that keep these pools busy; None where none would fit."""
    one = _partitioner(measurement, cluster, given)
    left = cluster.num_cpus - sum(pool.actors * pool.num_cpus for pool in pools.values())
    readers = Workers(2, cluster.task_cpus)
    asked = given["partition"].max_actors if "partition" in given else None
    most = asked or _floor((left - _reserved(cluster)) / one.num_cpus)
    if most < 1:
        return None
    whole = {"read": replace(readers, actors=2**40), "partition": replace(one, actors=most), **pools}
    rate = min(limits(measurement, whole, cluster).values())
    reading = measurement.stages["read"]
    wanted = max(2, needed(reading, 1, rate))
    partitioning = asked or min(most, needed(measurement.stages["partition"], one.threads, rate))
    while not asked and partitioning > 1 and partitioning * one.num_cpus + wanted * readers.num_cpus > left:
        partitioning -= 1  # readers come first: a partition worker without images is of no use
        whole["partition"] = replace(one, actors=partitioning)
        wanted = max(2, needed(reading, 1, min(limits(measurement, whole, cluster).values())))
    fitting = max(1, _floor((left - partitioning * one.num_cpus) / readers.num_cpus))
    return {
        "read": replace(readers, actors=min(wanted, fitting)),
        "partition": replace(one, actors=partitioning),
        **pools,
    }


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds else math.inf


def _floor(number: float) -> int:
    return math.floor(number + EPSILON)
