"""The section ``ray``: the captioning job on a corpus of files against the bare loop over the same files.

Both have the same model, policy, batch sizes and number of threads. What the job takes before its first rows
are done and after its last is start-up, and told apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from hired.errors import ConfigurationError
from pipeline.benchmark.arms import ARMS, EngineSystem
from pipeline.benchmark.bench import opened
from pipeline.benchmark.measure import NOT_MEASURED, digits, now, ratio, release, spread
from pipeline.benchmark.stages import bare_loop
from pipeline.benchmark.subject import Subject
from pipeline.cluster import start
from pipeline.config import Config, from_tree
from pipeline.run import caption_corpus

ARM = "hired-20"
# The bare loop's rate does not depend on how many images it is given; the job's start-up share does.
MAX_BARE_IMAGES = 2048


def measure(subject: Subject) -> dict[str, Any]:
    """Images a second of the bare loop and of the job, taking turns; models are loaded anew for each."""
    num_images = len(subject.files)
    num_bare = min(num_images, MAX_BARE_IMAGES)
    bare_s: list[float] = []
    jobs: list[dict[str, float]] = []
    with TemporaryDirectory(prefix="benchmark-") as folder, local_cluster(subject):
        corpus = written(subject, Path(folder))
        for number in range(subject.options.repeats):
            config = configuration(subject, corpus, Path(folder) / f"captions-{number}")
            bare_s.append(_bare_seconds(subject, config, subject.files[:num_bare]))
            release()
            jobs.append(_job(config, bare_s[-1] / num_bare))
    bare = spread([num_bare / seconds for seconds in bare_s])
    start_up: dict[str, Any] = dict.fromkeys(
        ("ray_images_per_s", "start_up_s", "start_up_share"), NOT_MEASURED
    )
    if all("start_up_s" in job for job in jobs):
        start_up = {
            "ray_images_per_s": spread([num_images / (job["wall_s"] - job["start_up_s"]) for job in jobs]),
            "start_up_s": spread([job["start_up_s"] for job in jobs]),
            "start_up_share": digits(statistics.median(job["start_up_s"] / job["wall_s"] for job in jobs)),
        }
    return start_up | {
        "images": num_images,
        "threads": subject.options.threads,
        "bare_images": num_bare,
        "bare_images_per_s": bare,
        "ray_images_per_s_with_start_up": spread([num_images / job["wall_s"] for job in jobs]),
        "ray_against_bare": ratio(start_up["ray_images_per_s"], bare),
        "stages": {name: job for name, job in jobs[-1].items() if name.endswith("_busy_s")},
        "options": list(subject.options.ray_options),
    }


def written(subject: Subject, folder: Path) -> Path:
    """A folder below with the images as files."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, file in enumerate(subject.files):
        (corpus / f"{number:06d}.jpg").write_bytes(file)
    return corpus


def configuration(subject: Subject, corpus: Path, output: Path) -> Config:
    """The job's: the run's own settings, and over them whatever ``--ray-option key=value`` says."""
    options = subject.options
    tree: dict[str, Any] = {
        "input": str(corpus),
        "output": str(output),
        "model": str(subject.path),
        "device": subject.device.type,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "policy": ARMS[ARM].policy,
        "token_budget": ARMS[ARM].rate,
        "prompt": options.prompt,
        "max_new_tokens": options.max_new_tokens,
        # A unit a batch: the times of their commits tell when rows were done.
        "rows_per_unit": options.batch_size,
        "encode": {"batch_size": options.encode_batch_size, "compile": options.compile},
        "generate": {"batch_size": options.batch_size},
    }
    for option in options.ray_options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigurationError(f"--ray-option {option}: write key=value, such as generate.threads=2")
        level = tree
        *levels, leaf = key.split(".")
        for name in levels:
            level = level.setdefault(name, {})
        level[leaf] = value
    return from_tree(tree)


def _bare_seconds(subject: Subject, config: Config, files: Sequence[bytes]) -> float:
    """After one batch that warms up."""
    with opened(subject, {ARM: ARMS[ARM]}, None) as benches:
        system = benches[ARM].system
        assert isinstance(system, EngineSystem)
        batch = config.generate.batch_size
        bare_loop(subject, system, ARMS[ARM], files[:batch], batch)
        start = now(subject.device)
        bare_loop(subject, system, ARMS[ARM], files, batch)
        return now(subject.device) - start


def _job(config: Config, bare_s_per_row: float) -> dict[str, float]:
    """Seconds of one run: all, start-up and end, and those that each stage's workers were busy.

    Start-up is the time to the first committed rows less what the bare loop takes for as many, and the time
    after the last; a corpus of which all rows are committed at once does not tell it.
    """
    started_s = time.perf_counter()
    manifest = caption_corpus(config)
    wall_s = time.perf_counter() - started_s
    if manifest.counts.dead_letters:
        raise RuntimeError(f"the job lost rows: {manifest.counts.dead_letters_by_error}")
    busy = {f"{stage}_busy_s": digits(cost.busy_s) for stage, cost in manifest.stages.items()}
    session = manifest.sessions[-1]
    committed = [(seconds, rows) for seconds, rows in session.progress if rows]
    if len(committed) < 2:
        return {"wall_s": wall_s} | busy
    (first_s, first_rows), (last_s, _) = committed[0], committed[-1]
    before_s = max(0.0, wall_s - session.wall_s + first_s - first_rows * bare_s_per_row)
    return {"wall_s": wall_s, "start_up_s": before_s + (session.wall_s - last_s)} | busy


@contextmanager
def local_cluster(subject: Subject) -> Iterator[None]:
    """Ray on this machine with as many CPUs as the bare loop has threads; its start is no part of a job."""
    joined = ray.is_initialized()
    if not joined:
        start(num_cpus=subject.options.threads)
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()
