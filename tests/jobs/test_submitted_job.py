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
import urllib.request
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
TOKEN = "d41d8cd98f00b204e9800998ecf8427ed41d8cd98f00b204"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


@dataclass(frozen=True)
class Head:
    """A running head: where jobs go, where it keeps its files, and the environment that may talk to it."""

    address: str
    folder: Path
    environment: dict[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    """A head of its own, with its own ports, folder and token; it ends with the test."""
    folder = Path(tempfile.mkdtemp(prefix="hired-", dir="/tmp"))  # socket paths must stay short
    (folder / "token").write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
        "RAY_worker_niceness": "0",
    }
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={folder}", *(f"--{option}={port}" for option, port in ports.items())]
    running = Head(f"http://127.0.0.1:{ports['dashboard-port']}", folder, environment)
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(running, process)
        yield running
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        kill_what_names(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_what_names(folder: Path) -> None:
    """End the head's processes that outlived it: they alone have its folder on their command line."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in command.read_bytes():
                os.kill(int(command.parent.name), signal.SIGKILL)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_for(head: Head, process: subprocess.Popen[bytes]) -> None:
    """Return once the head answers; a port that is open is not enough."""
    authorised = {"Authorization": f"Bearer {TOKEN}"}
    question = urllib.request.Request(f"{head.address}/api/version", headers=authorised)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(question, timeout=5):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    pytest.fail(f"the head did not start: {(head.folder / 'head.log').read_text()[-2000:]}")


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
    assert read_manifest(tmp_path / "out").sessions[-1].cluster["CPU"] == 2

    (uploaded,) = (head.folder / "session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*/")
    assert (uploaded / "jobs" / "caption_corpus.py").is_file()
    assert not (uploaded / ".venv").exists(), "what git ignores must not travel"

    other = submit(head, *job, "--prompt", "Why?")
    assert other.returncode != 0, "a configuration error fails the submitted job"
    assert "--prompt was 'Describe the image.' and is 'Why?'" in other.stdout + other.stderr
