"""Every arm's answer to every item, on Ray: chunks of pictures, each committed as a whole.

A chunk is a file named after the pictures in it. What a killed run has left is gone on with; a run that would
answer otherwise (another model, other arms, other questions) refuses the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from hired.errors import ConfigurationError
from hired.evaluation.items import Picture
from pipeline.cluster import join
from pipeline.driving import Stop, stopped_by_signals
from pipeline.evaluation.arms import described
from pipeline.evaluation.asking import AnyArm, Asker, Worker
from pipeline.manifest import fingerprint
from pipeline.storage import Store

IDENTITY = "identity.json"

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to end, and can go on from where it is."""


def answer_all(
    store: Store,
    worker: Worker,
    pictures: Sequence[Picture],
    arms: Sequence[AnyArm],
    chunk: int,
    asker: type[Asker],
) -> pa.Table:
    """All rows, in the order of pictures; an ``asker`` of these arms computes what is not stored yet.

    Raises ConfigurationError for a store whose answers were given otherwise, Interrupted after SIGTERM.
    """
    chunks = {
        _name(first, some): some
        for first in range(0, len(pictures), chunk)
        for some in [pictures[first : first + chunk]]
    }
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with store.lock(owner):
        _check_identity(store, _identity(worker, arms))
        missing = {name: some for name, some in chunks.items() if not store.exists(name)}
        if missing:
            _compute(store, worker, missing, arms, asker)
        return pa.concat_tables(_read(store, name) for name in chunks)


def _compute(
    store: Store,
    worker: Worker,
    chunks: dict[str, Sequence[Picture]],
    arms: Sequence[AnyArm],
    asker: type[Asker],
) -> None:
    join()
    started_s, done, total = time.perf_counter(), 0, sum(len(some) for some in chunks.values())
    with stopped_by_signals() as stop:
        for name, table in _computed(worker, chunks, arms, asker, stop):
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            store.write(name, sink.getvalue().to_pybytes())
            done += len(chunks[name])
            passed_s = time.perf_counter() - started_s
            log.info(
                "%d of %d pictures, %.1f answers/s, %.0f minutes left",
                done, total, table.num_rows / len(chunks[name]) * done / passed_s,
                (total - done) * passed_s / done / 60,
            )  # fmt: skip
    if stop.requested:
        raise Interrupted(f"{done} of {total} pictures are answered; the same command goes on")


def _computed(
    worker: Worker,
    chunks: dict[str, Sequence[Picture]],
    arms: Sequence[AnyArm],
    asker: type[Asker],
    stop: Stop,
) -> Iterator[tuple[str, pa.Table]]:
    """The chunks as they are answered; none is begun once a stop was asked for."""
    actor_type = ray.remote(asker).options(
        num_cpus=min(worker.threads, ray.cluster_resources().get("CPU", 1) / worker.actors),
        num_gpus=1 if worker.device.startswith("cuda") else 0,
        max_restarts=2,
        max_task_retries=2,
    )
    actors = [actor_type.remote(worker, arms) for _ in range(min(worker.actors, len(chunks)))]
    waiting = iter(chunks.items())
    running: dict[Any, tuple[str, Any]] = {}

    def begin(actor: Any) -> None:
        if not stop.requested and (pair := next(waiting, None)):
            running[actor.answers.remote(list(pair[1]))] = (pair[0], actor)

    try:
        for actor in actors:
            begin(actor)
        while running:
            [ready], _ = ray.wait(list(running))
            name, actor = running.pop(ready)
            begin(actor)
            yield name, ray.get(ready)
    finally:
        for actor in actors:
            ray.kill(actor)


def _name(first: int, pictures: Sequence[Picture]) -> str:
    """A chunk's file: another set of questions about the same pictures has another name."""
    asked = [(item.key, item.question, item.answers, item.metric) for p in pictures for item in p.items]
    data = b"".join(hashlib.sha256(picture.data).digest() for picture in pictures)
    digest = hashlib.sha256(json.dumps(asked).encode() + data).hexdigest()[:12]
    return f"chunk-{first:06d}-{len(pictures):03d}-{digest}.parquet"


def _identity(worker: Worker, arms: Sequence[AnyArm]) -> dict[str, Any]:
    return {
        "model": fingerprint(worker.model, worker.checkpoint).sha256,
        "dtype": worker.dtype or "auto",
        "device": worker.device.partition(":")[0],
        "arms": [described(arm) for arm in arms],
    }


def _check_identity(store: Store, identity: dict[str, Any]) -> None:
    """Writes what the answers follow from, or compares it."""
    if not store.exists(IDENTITY):
        store.write(IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())
        return
    before = json.loads(store.read(IDENTITY))
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed:
        raise ConfigurationError(
            f"the answers in {store.root} are of a run that differs in {', '.join(changed)}: name another "
            "--work, or delete that folder"
        )


def _read(store: Store, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(store.read(name)))
