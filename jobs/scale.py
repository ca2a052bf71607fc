"""Runs a corpus of a million rows through the pipeline with models that cost nothing, and watches the driver.

    python jobs/scale.py --rows 1000000 --output docs/results

Rows, reading, Ray Data, commits, shards and accounting are the real ones; images are a few bytes in parquet
files, and partitioning, encoding and generation are stand-ins that pass rows on. So the rate is that of the
pipeline alone, the most that any model could reach through it on this machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from hired.types import Caption
from pipeline.benchmark.record import commit
from pipeline.columns import Batch, failures, of_captions
from pipeline.config import Config, from_tree
from pipeline.costs import metered
from pipeline.graph import Stages
from pipeline.manifest import versions
from pipeline.questions import from_json
from pipeline.run import caption_corpus
from pipeline.stages import labels
from pipeline.storage import Store

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS_PER_INPUT = 100_000
# The driver's memory is compared between these shares of the rows.
FROM = 0.1


class PassOn:
    """Rows as they came, without their images."""

    def __init__(self, config: Config, name: str) -> None:
        self.name = name

    def __call__(self, batch: Batch) -> Batch:
        started_s = time.perf_counter()
        kept = {name: batch[name] for name in ("stage", "error_type", "error", "retryable")}
        return labels(batch) | kept | metered(self.name, len(batch["key"]), started_s)


class PartitionNothing(PassOn):
    """Stands for partitioning."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "partition")


class EncodeNothing(PassOn):
    """Stands for encoding."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "encode")


class GenerateEcho:
    """Stands for generation: a caption that holds the row's key."""

    name = "generate"

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        started_s, count = time.perf_counter(), len(batch["key"])
        questions = [from_json(str(text))[0] for text in batch["questions"]]
        rows = [
            failure or Caption(f"a picture called {key}", (1,), "stop", 600, 2880, 576)
            for key, failure in zip(batch["key"], failures(batch), strict=True)
        ]
        return (
            labels(batch)
            | {
                "question": np.array([question.number for question in questions], np.int32),
                "prompt": np.array([question.prompt for question in questions], dtype=object),
                "kept": np.full(count, "", dtype=object),
                "height": np.full(count, 8, np.int32),
                "width": np.full(count, 8, np.int32),
            }
            | of_captions(rows)
            | metered(self.name, count, started_s)
        )


def write_input(folder: Path, rows: int) -> None:
    """Parquet files of keys and tiny images, the last row of each without one."""
    for start in range(0, rows, ROWS_PER_INPUT):
        numbers = range(start, min(start + ROWS_PER_INPUT, rows))
        images = [{"bytes": b"tiny %d" % number, "path": f"{number}.png"} for number in numbers]
        images[-1] = None  # type: ignore[call-overload]
        table = pa.table(
            {"key": [f"row-{number:09d}" for number in numbers], "image": pa.array(images, IMAGE)}
        )
        pq.write_table(table, folder / f"{start:09d}.parquet", row_group_size=1000)


class Watch(threading.Thread):
    """Notes this process's resident memory, and how many rows are committed, every second."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.points: list[tuple[float, int, int]] = []  # seconds, published rows, bytes
        self._output, self._ended = output, threading.Event()

    def run(self) -> None:
        started_s = time.perf_counter()
        while not self._ended.wait(1):
            rows = sum(_rows(file) for file in (self._output / "captions").glob("part-*.parquet"))
            self.points.append((time.perf_counter() - started_s, rows, resident_bytes()))

    def end(self) -> None:
        self._ended.set()
        self.join()


_counted: dict[Path, int] = {}


def _rows(file: Path) -> int:
    if file not in _counted:
        _counted[file] = pq.read_metadata(file).num_rows
    return _counted[file]


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(rows: int, folder: Path) -> dict[str, Any]:
    """What a run of so many rows took."""
    (folder / "in").mkdir()
    write_input(folder / "in", rows)
    config = from_tree(
        {
            "input": str(folder / "in"),
            "output": str(folder / "out"),
            "rows_per_unit": 500,
            "actors": "fixed",
            "partition": {"batch_size": 250},
            "encode": {"batch_size": 250},
            "generate": {"batch_size": 250},
        }
    )
    watch = Watch(folder / "out")
    watch.start()
    manifest = caption_corpus(
        config, stages=Stages(partition=PartitionNothing, encode=EncodeNothing, generate=GenerateEcho)
    )
    watch.end()
    early, late = (memory_at(watch.points, share * rows) for share in (FROM, 0.98))
    session = manifest.sessions[-1]
    return {
        "rows": manifest.counts.rows,
        "captions": manifest.counts.captions,
        "dead_letters": manifest.counts.dead_letters,
        "wall_s": round(session.wall_s, 1),
        "rows_per_s": round(rows / session.wall_s, 1),
        "driver_mib_at_a_tenth": round(early / 2**20),
        "driver_mib_at_the_end": round(late / 2**20),
        "driver_mib_growth": round((late - early) / 2**20),
    }


def memory_at(points: Sequence[tuple[float, int, int]], rows: float) -> int:
    """The most memory within five seconds of the moment when so many rows were published."""
    when = next((seconds for seconds, done, _ in points if done >= rows), points[-1][0])
    return max(memory for seconds, _, memory in points if abs(seconds - when) <= 5)


def page(result: dict[str, Any], record: dict[str, Any]) -> str:
    """The result as people read it."""
    return (
        f"# {result['rows']:,} rows\n\n"
        f"{record['cpus']} CPUs, ray {record['versions']['ray']}, commit {record['commit']}. Models are "
        "stand-ins that cost nothing; rows, reading, Ray Data, commits, shards and accounting are real.\n\n"
        f"    {record['command']}\n\n"
        "| | |\n|---|---|\n"
        f"| captions | {result['captions']:,} |\n"
        f"| dead letters | {result['dead_letters']:,} |\n"
        f"| seconds, all | {result['wall_s']:,} |\n"
        f"| rows a second | {result['rows_per_s']:,} |\n"
        f"| driver's resident memory after a tenth of the rows | {result['driver_mib_at_a_tenth']:,} MiB |\n"
        f"| at the end | {result['driver_mib_at_the_end']:,} MiB |\n"
        f"| growth | {result['driver_mib_growth']:,} MiB |\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every row was accounted for."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many [%(default)s]")
    parser.add_argument(
        "--output", type=Path, help="folder for scale.json and scale.md; printed if not given"
    )
    options = parser.parse_args(arguments)
    # Stages defined in this file travel by value: workers cannot import it.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with TemporaryDirectory(prefix="scale-") as folder:
        result = run(options.rows, Path(folder))
    record = {
        "command": " ".join(["python", "jobs/scale.py", *arguments]),
        "cpus": os.cpu_count(),
        "commit": commit(),
        "versions": versions(),
        "result": result,
    }
    if options.output:
        store = Store(options.output)
        store.write("scale.json", json.dumps(record, indent=2).encode() + b"\n")
        store.write("scale.md", page(result, record).encode())
    print(page(result, record))
    return int(result["rows"] != options.rows)


if __name__ == "__main__":
    sys.exit(main())
