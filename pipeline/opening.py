"""Opening a run: a new one in an empty folder, or an unfinished one that is the same in every option."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hired.errors import ConfigurationError
from pipeline.columns import Failure
from pipeline.config import Config, differences
from pipeline.inventory import Inventory, find_inventory, take_inventory
from pipeline.layout import Layout
from pipeline.manifest import Identity, Model, fingerprint, versions
from pipeline.questions import Questionnaire, to_json
from pipeline.reading import read
from pipeline.rows import to_items
from pipeline.sources import ScanOptions, scan
from pipeline.storage import Store

IDENTITY, SUCCESS = "_work/run.json", "_SUCCESS"
PRIVATE = "_work/"
# Rows that are read before a run starts.
NUM_TRIED = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is open: its folder, what it is, and its rows."""

    store: Store
    identity: Identity
    inventory: Inventory
    questionnaire: Questionnaire


def open_run(config: Config, store: Store, checkpoint: Path, run_id: str, command: str) -> Run:
    """The run of ``config.output``, begun here or before; its folder must be locked.

    Raises ConfigurationError for a folder of something else, and for options that differ from those the run
    began with.
    """
    questionnaire = config.questionnaire()
    model = fingerprint(config.model, checkpoint)
    # The files that options name may change while their names stay.
    options = config.model_dump(mode="json") | {"questions": to_json(questionnaire.questions)}
    identity = _identity(store)
    if identity is None:
        _check_empty(store)
    else:
        _check_same(identity, options, model)
        log.info("going on with run %s", identity.run_id)
    inventory = find_inventory(store) or _take(config, store, questionnaire)
    if identity is None:
        identity = Identity(
            run_id=run_id,
            started_at=datetime.now(UTC),
            command=command,
            configuration=options,
            model=model,
            versions=versions(),
        )
        store.write(IDENTITY, identity.model_dump_json(indent=2).encode())
    return Run(store, identity, inventory, questionnaire)


def check_startable(config: Config, store: Store) -> None:
    """Raise ConfigurationError for a new run whose output holds something else, or whose input holds nothing.

    Where none of the first rows can be read, a warning says why: the others may be better.
    """
    if _identity(store) is not None:
        return
    _check_empty(store)
    options = replace(scan_options(config, config.questionnaire()), key="path", dedup="none")
    first = list(to_items(next(scan(config.input, options)).slice(0, NUM_TRIED)))
    images = list(read(first, config.reading))
    failed = [image for image in images if isinstance(image, Failure)]
    if images and len(failed) == len(images):
        log.warning("none of the first %d rows can be read: %s", len(failed), failed[0].error)


def scan_options(config: Config, questionnaire: Questionnaire) -> ScanOptions:
    """What the sources are asked for."""
    reading = config.reading
    columns = dict.fromkeys([*config.keep_columns, *questionnaire.columns])
    return ScanOptions(
        image_column=config.image_column,
        uri_column=config.uri_column,
        key_column=config.key_column,
        columns=tuple(columns),
        key=config.key,
        dedup=config.dedup,
        storage=reading.storage,
        http=reading.http,
        max_file_bytes=reading.max_file_bytes,
    )


def _take(config: Config, store: Store, questionnaire: Questionnaire) -> Inventory:
    def arrange(num_rows: int) -> Layout:
        return Layout.of(num_rows, config.rows_per_unit, config.rows_per_file)

    log.info("listing %s", config.input)
    inventory = take_inventory(
        store,
        scan(config.input, scan_options(config, questionnaire)),
        arrange,
        dedup=config.dedup == "sha256",
        num_sampled=config.sample,
        limit=config.limit,
        seed=config.seed,
    )
    log.info("%d rows in %s", inventory.layout.num_rows, config.input)
    return inventory


def _identity(store: Store) -> Identity | None:
    return Identity.model_validate_json(store.read(IDENTITY)) if store.exists(IDENTITY) else None


def _check_empty(store: Store) -> None:
    foreign = [name for name in store.list() if not name.startswith(PRIVATE)]
    if foreign:
        raise ConfigurationError(
            f"--output {store.root} already holds something else ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}); name another folder, or remove that one"
        )


def _check_same(identity: Identity, options: dict[str, Any], model: Model) -> None:
    differing = differences(identity.configuration, options)
    if identity.model.sha256 != model.sha256:
        differing.append(f"the weights of {model.name} are others")
    if differing:
        raise ConfigurationError(
            f"--output holds run {identity.run_id}, which began with other options: {'; '.join(differing)}; "
            "give it the same ones, or name another folder"
        )
