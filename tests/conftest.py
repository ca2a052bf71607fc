"""What all tests share: the corpus of real image files, and how hypothesis runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.pictures import write_corpus

# No deadline: a busy machine is no failure. In CI the same examples every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of image files: ``photos``, ``documents`` and ``hostile``.

    The real one lies beside the project or where HIRED_TEST_CORPUS says. Without it, CI runs on a generated
    stand-in, so that no test is lost silently there.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "corpus"
    folder = Path(os.environ.get("HIRED_TEST_CORPUS", beside))
    if folder.is_dir():
        return folder
    if "HIRED_TEST_CORPUS" in os.environ:
        pytest.fail(f"HIRED_TEST_CORPUS={folder} is not a folder")
    if not os.environ.get("CI"):
        pytest.skip(
            f"no corpus of real images at {folder}; set HIRED_TEST_CORPUS, or CI=1 to generate a stand-in"
        )
    generated = tmp_path_factory.mktemp("corpus")
    write_corpus(generated)
    return generated


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT of no size, with random weights."""
    from tests.tiny import tiny_llava_next

    return tiny_llava_next(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray cluster of two CPUs for all that runs in the tests' own process."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine workers would starve
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for stages that tests define
        ray.init(
            address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=500 * 2**20
        )
        yield
        ray.shutdown()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure, unless it is for want of a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    lost = [report.nodeid for report in skipped if "gpu" not in report.keywords]
    if os.environ.get("CI") and lost:
        reporter.write_line(f"\nskipped in CI, which counts as failed: {', '.join(lost)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
