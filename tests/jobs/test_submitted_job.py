"""``ray job submit --working-dir . -- python jobs/caption_corpus.py`` against a head of the test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.manifest import read_manifest
from tests.pictures import picture, saved

PROJECT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
START_S = 300


@dataclass(frozen=True)
class Head:
    """A running head: where jobs go, where it keeps its files, and the environment that may talk to it."""

    address: str
    folder: Path
    environment: dict[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    """A head of its own: ports, folder and token; ended by its own process group."""
    folder = Path(tempfile.mkdtemp(prefix="hired-", dir="/tmp"))  # socket paths must stay short
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    (folder / "token").write_text("d41d8cd98f00b204e9800998ecf8427ed41d8cd98f00b204")
    options = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = dict(zip(options, free_ports(len(options)), strict=True))
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={folder}",
        "--dashboard-host=127.0.0.1",
    ]
    command += [f"--{option}={port}" for option, port in ports.items()]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(ports["dashboard-port"], process, folder / "head.log")
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", folder, environment)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            break
    pytest.fail(f"the head did not start: {log.read_text()[-2000:]}")


def submit(head: Head, *job: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(RAY),
        "job",
        "submit",
        "--address",
        head.address,
        "--working-dir",
        ".",
        "--",
        sys.executable,
        *job,
    ]
    return subprocess.run(
        command, cwd=PROJECT, env=head.environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_runs_when_submitted_to_a_running_head(head: Head, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    paths = ["--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]
    job = ["jobs/caption_corpus.py", *paths, "--model", str(checkpoint), "--max-new-tokens", "3"]

    submitted = submit(head, *job)
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    assert "2 rows: 1 captions, 1 dead letters" in submitted.stdout
    assert pq.read_table(tmp_path / "out" / "captions")["key"].to_pylist() == ["good.png"]
    assert pq.read_table(tmp_path / "out" / "dead_letters")["key"].to_pylist() == ["bad.png"]
    assert read_manifest(tmp_path / "out").cluster["CPU"] == 2

    (uploaded,) = (head.folder / "session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*/")
    assert (uploaded / "jobs" / "caption_corpus.py").is_file()
    assert not (uploaded / ".venv").exists(), "what git ignores must not travel"

    again = submit(head, *job)
    assert again.returncode != 0, "a configuration error fails the submitted job"
    assert "already holds a run" in again.stdout + again.stderr
