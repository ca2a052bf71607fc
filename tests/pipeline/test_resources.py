"""Pools settle into any cluster they fit into, and say so when they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hired.embedded import CHECKPOINT
from hired.errors import ConfigurationError
from hired.families.checkpoint import num_parameters
from pipeline.config import Config, from_tree
from pipeline.resources import Cluster, check_memory, settle


def config(**options: Any) -> Config:
    return from_tree({"input": "in", "output": "out", **options})


def needed_cpus(settled: Config, cluster: Cluster) -> float:
    pools = (settled.partition, settled.encode, settled.generate)
    return sum((pool.max_actors or 0) * (pool.num_cpus or 0) for pool in pools) + 2 * cluster.task_cpus


@given(st.integers(1, 512))
def test_the_defaults_fit_into_any_number_of_cpus_and_leave_room_for_reading(num_cpus: int) -> None:
    cluster = Cluster(num_cpus=num_cpus)
    settled = settle(config(), cluster)
    assert needed_cpus(settled, cluster) <= num_cpus + 1e-6
    assert settled.device == "cpu"
    assert settled.encode.num_gpus == settled.generate.num_gpus == 0
    for pool in (settled.partition, settled.encode, settled.generate):
        assert None not in pool.model_dump(exclude={"max_patches"}).values()
        assert pool.threads == max(1, int(pool.num_cpus or 0))


@given(st.integers(1, 16), st.integers(4, 32))
def test_every_gpu_carries_an_encode_and_a_generate_worker(num_gpus: int, cpus_a_gpu: int) -> None:
    cluster = Cluster(num_cpus=num_gpus * cpus_a_gpu, num_gpus=num_gpus)
    settled = settle(config(), cluster)
    assert settled.device == "cuda"
    assert settled.encode.max_actors == settled.generate.max_actors == num_gpus
    assert (settled.encode.num_gpus or 0) + (settled.generate.num_gpus or 0) == 1
    assert needed_cpus(settled, cluster) <= cluster.num_cpus + 1e-6


def test_what_is_given_stays() -> None:
    given = config(device="cpu", encode={"num_cpus": 2.5, "threads": 7}, partition={"max_actors": 3})
    settled = settle(given, Cluster(num_cpus=16, num_gpus=4))
    assert settled.device == "cpu"
    assert (settled.encode.num_cpus, settled.encode.threads, settled.encode.num_gpus) == (2.5, 7, 0)
    assert settled.partition.max_actors == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encode": {"min_actors": 4}}, r"need 3.5 CPUs and the cluster has 2 \(.*encode 4 x 0.5"),
        ({"partition": {"num_cpus": 2}}, "partition 1 x 2"),
        ({"device": "cuda"}, "need 1 GPUs and the cluster has 0"),
    ],
)
def test_pools_that_do_not_fit_are_refused_with_their_shares(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        settle(config(**options), Cluster(num_cpus=2))
    settle(config(**options, autoscaling=True), Cluster(num_cpus=2))


def test_workers_that_cannot_be_in_memory_are_refused_before_they_start() -> None:
    assert 5_000_000 < num_parameters(CHECKPOINT) < 8_000_000
    roomy, tight = (Cluster(num_cpus=4, memory_bytes=gib * 2**30) for gib in (8, 1))
    settled = settle(config(), roomy)
    check_memory(settled, roomy, CHECKPOINT)
    with pytest.raises(ConfigurationError, match=r"need 1\.\d GiB .* has 1\.0: lower --generate.max-actors"):
        check_memory(settled, tight, CHECKPOINT)
    check_memory(settle(config(autoscaling=True), tight), tight, CHECKPOINT)
