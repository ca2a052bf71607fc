"""One Ray cluster of two CPUs for all jobs that run in the tests' own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_llava_next


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine workers would starve
        ray.init(
            address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=500 * 2**20
        )
        yield
        ray.shutdown()
