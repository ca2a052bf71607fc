"""An evaluation from its options to the page."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hired import families
from hired.devices import describe_hardware, resolve_device
from hired.embedded.checkpoint import training
from hired.errors import ConfigurationError
from hired.evaluation.fastv import FastV
from hired.evaluation.items import Picture
from hired.vlm import resolve
from pipeline.benchmark.record import commit
from pipeline.evaluation import figures, sets
from pipeline.evaluation.answers import answer_all
from pipeline.evaluation.arms import CANNOT, ablation_arms, described, fastv_arms, table_arms
from pipeline.evaluation.asking import AnyArm, Asker, FastVAsker, PolicyAsker, Worker
from pipeline.evaluation.looking import look
from pipeline.evaluation.options import Options
from pipeline.evaluation.page import MORE, page
from pipeline.evaluation.plots import plot
from pipeline.manifest import fingerprint, versions
from pipeline.storage import Store

PAGE, RECORD, ANSWERS = "README.md", "record.json", "answers.parquet"

log = logging.getLogger(__name__)


def run(options: Options, command: str) -> Path:
    """Answers what is missing, then writes record, page and pictures; the page's place.

    With ``--write-tasks`` the drawn tasks are written there and nothing is asked.
    """
    if options.write_tasks is not None:
        sets.write(options.write_tasks, sets.pictures(options))
        return options.write_tasks
    started_s = time.perf_counter()
    worker = _worker(options)
    # What cannot be had is an error before anything is drawn.
    arms, beside = table_arms(options), [_beside(path) for path in options.beside]
    _fastv_arms(options, worker)
    pictures = sets.pictures(options)
    store = Store(options.output)
    record = _surroundings(options, command, worker, pictures)
    sections = options.wanted.sections
    if "table" in sections:
        answers = _answers(options, worker, pictures, arms, "table")
        _write_answers(store, ANSWERS, answers)
        record["table"] = figures.table(figures.Answers.of(answers), options.draws)
        record["arms"] = [described(arm) for arm in arms]
        record["beside"] = beside
    if "ablations" in sections:
        record["ablations"] = _ablations(options, worker, pictures, store)
    if "fastv" in sections:
        record["fastv"] = _fastv(options, worker, pictures, answers, store)
    if "attention" in sections:
        record["attention"] = look(worker, pictures[: options.attention_pictures])
    record["speed"] = _speed(options)
    record["seconds"] = round(time.perf_counter() - started_s)
    store.write(RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return write_page(options.output)


def _ablations(options: Options, worker: Worker, pictures: list[Picture], store: Store) -> dict[str, Any]:
    """HiRED's decisions changed one by one."""
    feature_layer, num_heads = _tower(worker)
    arms = ablation_arms(options, feature_layer=feature_layer, num_heads=num_heads)
    some = pictures[: options.ablation_pictures or len(pictures)]
    answers = _answers(options, worker, some, arms, "ablations")
    _write_answers(store, f"ablations-{ANSWERS}", answers)
    return figures.ablations(figures.Answers.of(answers), options.ablation_budget, options.draws)


def _fastv(
    options: Options, worker: Worker, pictures: list[Picture], others: pa.Table, store: Store
) -> dict[str, Any]:
    """Dropping inside the language model, beside the table's answers."""
    some = pictures[: options.fastv_pictures]
    answers = _answers(options, worker, some, _fastv_arms(options, worker), "fastv", FastVAsker)
    _write_answers(store, f"fastv-{ANSWERS}", answers)
    return figures.in_language(answers, others, _language_layers(worker), options.draws)


def write_page(folder: Path) -> Path:
    """The page and its pictures anew, from the record in the folder."""
    store = Store(folder)
    record = json.loads(store.read(RECORD))
    drawn = plot(record, store)
    more = [name for name in MORE if store.exists(name)]
    store.write(PAGE, page(record, drawn, more).encode())
    return folder / PAGE


def _answers(
    options: Options,
    worker: Worker,
    pictures: list[Picture],
    arms: Sequence[AnyArm],
    section: str,
    asker: type[Asker] = PolicyAsker,
) -> pa.Table:
    num_items = sum(len(picture.items) for picture in pictures)
    log.info("%s: %d arms x %d questions about %d pictures", section, len(arms), num_items, len(pictures))
    store = Store(options.work / section / options.split)
    return answer_all(store, worker, pictures, arms, options.chunk, asker)


def _worker(options: Options) -> Worker:
    device = resolve_device(options.device)
    cores = max(
        1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // options.threads
    )
    return Worker(
        model=options.model,
        checkpoint=resolve(options.model),
        device=str(device),
        dtype=options.dtype,
        threads=options.threads,
        actors=options.actors or (cores if device.type == "cpu" else max(1, torch.cuda.device_count())),
    )


def _tower(worker: Worker) -> tuple[int, int]:
    """The number of its feature layer, and of its heads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(worker.checkpoint, local_files_only=True)
    encoder = families.load_encoder(worker.checkpoint, device="cpu")
    return encoder.feature_layer, int(config.vision_config.num_attention_heads)


def _fastv_arms(options: Options, worker: Worker) -> list[FastV]:
    return fastv_arms(options, _language_layers(worker)) if "fastv" in options.wanted.sections else []


def _language_layers(worker: Worker) -> int:
    """How many layers its language model has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(worker.checkpoint, local_files_only=True)
    return int(config.get_text_config().num_hidden_layers)


def _beside(path: Path) -> dict[str, Any]:
    """What the page shows of another model's record."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        own = {name: other[name] for name in ("model", "command", "commit", "items", "pictures")}
        return own | {name: other["table"][name] for name in ("arms", "differences")}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"--beside {path} is no record of jobs/evaluate.py with a table ({type(error).__name__}: {error})"
        ) from error


def _surroundings(options: Options, command: str, worker: Worker, pictures: list[Picture]) -> dict[str, Any]:
    known = versions()
    wanted = options.wanted
    return {
        "command": command,
        "commit": commit(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": options.model,
            "sha256": fingerprint(options.model, worker.checkpoint).sha256,
            "trained_by": (training(worker.checkpoint) or {}).get("command"),
        },
        "hardware": describe_hardware(torch.device(worker.device)),
        "dtype": options.dtype or "auto",
        "versions": {name: known[name] for name in ("python", "torch", "transformers", "ray")},
        "split": options.split,
        "seed": options.seed,
        "tasks": list(options.tasks),
        "pictures": len(pictures),
        "items": sum(len(picture.items) for picture in pictures),
        "policies": list(wanted.policies),
        "left_out": CANNOT,
        "budgets": list(wanted.budgets),
        "random_seeds": wanted.random_seeds,
        "draws": options.draws,
    }


def _speed(options: Options) -> dict[str, Any] | None:
    """Images/s by arm from a benchmark's record of the same model, with where they come from."""
    if not options.speed.is_file():
        return None
    try:
        benchmark = json.loads(options.speed.read_text(encoding="utf-8"))
        section = benchmark["sections"]["stages"]
        rates = {
            name: cell["whole_images_per_s"]["median"] for name, cell in section["figures"]["arms"].items()
        }
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(f"--speed {options.speed} is no record of jobs/benchmark.py") from error
    if benchmark["model"] != options.model:
        return None
    source = {name: section[name] for name in ("command", "commit")}
    return {"file": options.speed.name, "hardware": benchmark["hardware"], **source, "images_per_s": rates}


def _write_answers(store: Store, name: str, answers: pa.Table) -> None:
    """All rows in one file, small enough to keep: texts repeat."""
    sink = pa.BufferOutputStream()
    pq.write_table(answers, sink, compression="zstd", compression_level=19)
    store.write(name, sink.getvalue().to_pybytes())
