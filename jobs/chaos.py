"""Kills captioning runs in every way there is, goes on with them, and compares keys.

    python jobs/chaos.py --rounds 20 --output docs/results

Each round captions the same images, some of them broken, with units and shards so small that there are many
commits. Something dies once: the driver at one of its writes or deletions, or at a random moment; a worker in
a call; a node of two. Then the same command runs again until it ends by itself. The round holds if every key
is in captions or dead letters, once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

import numpy as np
import pyarrow.parquet as pq
import ray
from PIL import Image

from pipeline.benchmark.record import commit
from pipeline.columns import Batch
from pipeline.config import Config, from_tree
from pipeline.graph import Stages
from pipeline.manifest import versions
from pipeline.run import caption_corpus
from pipeline.stages import EncodeStage, GenerateStage
from pipeline.storage import Store

NUM_BROKEN = 7
MAX_STARTS = 5
TIMEOUT_S = 600
# What the driver dies at: the place in the output whose nth write, or deletion, it does not survive.
STEPS = (
    ("_work/rows", 0),
    ("_work/inventory.json", 0),
    ("_work/run.json", 0),
    ("_work/units", 0),
    ("_work/units", 7),
    ("captions", 0),
    ("captions", 3),
    ("dead_letters", 1),
    ("_work/shards", 0),
    ("_work/shards", 2),
    ("deleted _work/units", 1),
    ("deleted _work/units", 11),
    ("report.html", 0),
    ("manifest.json", 0),
    ("_SUCCESS", 0),
)
KINDS = ("driver at a step", "driver at random", "encode worker", "generate worker", "node")

log = logging.getLogger("chaos")


@dataclass(frozen=True, slots=True)
class Blow:
    """What dies, and when: a step's number, seconds, or a call's number."""

    kind: str
    at: float
    after: bool = False

    def __str__(self) -> str:
        if self.kind != "driver at a step":
            return f"{self.kind}, {self.at:g}"
        place, number = STEPS[int(self.at)]
        return f"driver {'after' if self.after else 'before'} {place} number {number}"


@dataclass(frozen=True, slots=True)
class Round:
    """How a round went. ``starts`` counts the first go and those that went on with it."""

    blow: str
    starts: int
    struck: bool
    lost: int
    doubled: int
    seconds: float


def blows(rounds: int, seed: int) -> list[Blow]:
    """Half of them at steps of the commit, in turn; the others at everything else."""
    draw = random.Random(seed)
    steps = iter(draw.sample(range(len(STEPS)), len(STEPS)) * rounds)
    planned = []
    for number in range(rounds):
        if number % 2 == 0:
            planned.append(Blow("driver at a step", next(steps), after=number % 4 == 0))
        else:
            kind = KINDS[1 + number // 2 % 4]
            at = draw.uniform(1, 12) if kind == "driver at random" else draw.randint(1, 6)
            planned.append(Blow(kind, round(at, 1)))
    return planned


def paint(folder: Path, count: int) -> list[str]:
    """Small pictures and a few that are none; the keys of all."""
    noise = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number % 5}" / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number % (count // NUM_BROKEN) == 1:
            file.write_bytes(b"no picture")
        else:
            pixels = noise.integers(0, 255, (24, 24 + number % 40, 3), np.uint8)
            Image.fromarray(pixels).save(file)
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))


def run_round(blow: Blow, images: Path, keys: Sequence[str], folder: Path) -> Round:
    """Start, strike, go on, compare."""
    started_s, struck = time.perf_counter(), folder / "struck"
    starts = 1
    while (code := _drive(blow, images, folder, struck)) != 0:
        if starts == MAX_STARTS:
            log.error("%s", (folder / "log").read_text(errors="replace")[-8000:])
            raise RuntimeError(f"{blow}: not done after {MAX_STARTS} starts")
        log.info("%s: ended with %d, going on", blow, code)
        starts += 1
    found = Counter(
        key
        for name in ("captions", "dead_letters")
        for key in pq.read_table(folder / "out" / name, columns=["key"])["key"].to_pylist()
    )
    lost, doubled = Counter(keys) - found, found - Counter(keys)
    seconds = round(time.perf_counter() - started_s, 1)
    return Round(str(blow), starts, struck.exists(), lost.total(), doubled.total(), seconds)


def _drive(blow: Blow, images: Path, folder: Path, struck: Path) -> int:
    """The exit code of a driver of its own, in a session of its own."""
    command = [sys.executable, __file__, "--drive", json.dumps(asdict(blow)), str(images), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    with (folder / "log").open("ab") as out:
        driver = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            if blow.kind == "driver at random" and not struck.exists():
                _wait_for(folder / "out" / "_work" / "run.json", driver)
                time.sleep(blow.at)
                if driver.poll() is None:
                    struck.touch()
                    driver.kill()
            return driver.wait(TIMEOUT_S)
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()


def _wait_for(file: Path, driver: subprocess.Popen[bytes]) -> None:
    while driver.poll() is None and not file.exists():
        time.sleep(0.05)


# What runs in the driver's own process.


def drive(blow: Blow, images: Path, folder: Path) -> None:
    """The captioning run, with the blow in it unless it fell before."""
    struck = folder / "struck"
    config = configuration(images, folder / "out")
    if blow.kind == "driver at a step" and not struck.exists():
        place, number = STEPS[int(blow.at)]
        _strike_store(place, number, blow.after, struck)
    if blow.kind == "node":
        _drive_on_two_nodes(config, struck, round(blow.at))
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=400 * 2**20)
    caption_corpus(config, stages=_stages(blow, struck))


def configuration(images: Path, output: Path) -> Config:
    """Many small commits."""
    return from_tree(
        {
            "input": str(images),
            "output": str(output),
            "max_new_tokens": 2,
            "rows_per_unit": 8,
            "rows_per_file": 40,
            "encode": {"batch_size": 4},
            "generate": {"batch_size": 8},
        }
    )


def _strike_store(place: str, number: int, after: bool, struck: Path) -> None:
    """Let this process die before or after the store's nth write, or deletion, at a place."""
    left = [number]

    def reached(name: str) -> bool:
        if not name.startswith(place):
            return False
        left[0] -= 1
        return left[0] == -1

    def die() -> None:
        struck.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    write, writer, delete = Store.write, Store.writer, Store.delete

    def mortal_write(self: Store, name: str, data: bytes) -> None:
        now = reached(name)
        if now and not after:
            die()
        write(self, name, data)
        if now:
            die()

    @contextmanager
    def mortal_writer(self: Store, name: str) -> Iterator[Any]:
        now = reached(name)
        with writer(self, name) as file:
            yield file
            if now and not after:
                die()
        if now:
            die()

    def mortal_delete(self: Store, *names: str) -> None:
        for name in names:
            if reached(f"deleted {name}"):
                die()
            delete(self, name)

    Store.write, Store.writer, Store.delete = mortal_write, mortal_writer, mortal_delete  # type: ignore[method-assign]


def _stages(blow: Blow, struck: Path) -> Stages:
    mortal = {"encode worker": ("encode", EncodeStage), "generate worker": ("generate", GenerateStage)}
    if blow.kind not in mortal:
        return Stages()
    name, stage = mortal[blow.kind]
    return Stages(**{name: _mortal(stage, round(blow.at), str(struck))})


def _mortal(stage: Any, calls: int, struck: str) -> type:
    class Mortal(stage):  # type: ignore[misc]
        """The stage, whose process dies in one of its calls."""

        _left = calls

        def __call__(self, batch: Batch) -> Batch:
            self._left -= 1
            if self._left == 0 and not os.path.exists(struck):
                Path(struck).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            result: Batch = super().__call__(batch)
            return result

    return Mortal


def _drive_on_two_nodes(config: Config, struck: Path, units: int) -> None:
    """Caption on two nodes, of which the one with the workers goes after some commits, and another comes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 300 * 2**20}
    )
    node = cluster.add_node(num_cpus=2, object_store_memory=300 * 2**20)
    ray.init(address=cluster.address)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            caption_corpus(config)
        except BaseException as error:
            failures.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    committed = Path(config.output) / "_work" / "units"
    while runner.is_alive() and not struck.exists():
        if committed.is_dir() and len(list(committed.iterdir())) >= units:
            struck.touch()
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=2, object_store_memory=300 * 2**20)
        time.sleep(0.1)
    runner.join()
    if failures:
        raise failures[0]


def page(rounds: Sequence[Round], record: dict[str, Any]) -> str:
    """The result as people read it."""
    bad = [each for each in rounds if each.lost or each.doubled]
    lines = [
        "# Chaos",
        "",
        f"{len(rounds)} rounds of {record['rows']} rows on {record['cpus']} CPUs, "
        f"ray {record['versions']['ray']}, commit {record['commit']}: **{len(rounds) - len(bad)} held**, "
        f"{len(bad)} did not. "
        f"In {sum(each.struck for each in rounds)} the blow fell before the run was done.",
        "",
        f"    {record['command']}",
        "",
        "| what died | starts | it fell | lost | doubled | seconds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each.blow} | {each.starts} | {'yes' if each.struck else 'no'} | {each.lost} | "
            f"{each.doubled} | {each.seconds} |"
            for each in rounds
        ),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every round held."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if arguments[:1] == ["--drive"]:
        drive(Blow(**json.loads(arguments[1])), Path(arguments[2]), Path(arguments[3]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="how many [%(default)s]")
    parser.add_argument("--rows", type=int, default=300, help="images [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of what dies when [%(default)s]")
    parser.add_argument(
        "--output", type=Path, help="folder for chaos.json and chaos.md; printed if not given"
    )
    options = parser.parse_args(arguments)
    rounds = []
    with TemporaryDirectory(prefix="chaos-") as folder:
        images = Path(folder) / "images"
        keys = paint(images, options.rows)
        for number, blow in enumerate(blows(options.rounds, options.seed)):
            place = Path(folder) / f"round-{number}"
            place.mkdir()
            rounds.append(run_round(blow, images, keys, place))
            log.info("round %d: %s", number, rounds[-1])
    record = {
        "command": " ".join(["python", "jobs/chaos.py", *arguments]),
        "rows": options.rows,
        "cpus": os.cpu_count(),
        "commit": commit(),
        "versions": versions(),
        "rounds": [asdict(each) for each in rounds],
    }
    if options.output:
        store = Store(options.output)
        store.write("chaos.json", json.dumps(record, indent=2).encode() + b"\n")
        store.write("chaos.md", page(rounds, record).encode())
    print(page(rounds, record))
    return int(any(each.lost or each.doubled for each in rounds))


if __name__ == "__main__":
    sys.exit(main())
