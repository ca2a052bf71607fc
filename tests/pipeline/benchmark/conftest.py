"""One toy model and a handful of images for all tests of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.benchmark.subject import Options, Subject


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(
        model="toy",
        images=4,
        aspect="mix",
        max_new_tokens=3,
        batch_size=2,
        encode_batch_size=3,
        baseline_batches=(1, 2),
        latency_images=2,
        memory_cap_gib=(0.01,),
        repeats=1,
        device="cpu",
        dtype="float32",
        threads=1,
        cache=tmp_path_factory.mktemp("models"),
        output=tmp_path_factory.mktemp("results"),
    )


@pytest.fixture(scope="session")
def subject(options: Options) -> Subject:
    return Subject(options)


@pytest.fixture(scope="session")
def models(options: Options) -> Path:
    return options.cache
