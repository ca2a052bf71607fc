"""Where rows end: each in exactly one of ``captions/*.parquet`` and ``dead_letters/*.parquet``.

Files appear whole or not at all (written aside, then renamed), and a write task that is tried again writes
the same names again. The run is complete once its manifest is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data import Datasink
from ray.data.block import BlockAccessor

from hired.errors import ConfigurationError
from pipeline.config import Config
from pipeline.costs import StageCost, added, stage_costs
from pipeline.manifest import MANIFEST


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


CAPTIONS = _schema(
    key=pa.string(),
    path=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
    model=pa.string(),
    policy=pa.string(),
    prompt=pa.string(),
    caption=pa.string(),
    finish_reason=pa.string(),
    prompt_tokens=pa.int32(),
    visual_tokens_full=pa.int32(),
    visual_tokens_kept=pa.int32(),
    completion_tokens=pa.int32(),
    run_id=pa.string(),
)
DEAD_LETTERS = _schema(
    key=pa.string(),
    path=pa.string(),
    stage=pa.string(),
    error_type=pa.string(),
    error=pa.string(),
    retryable=pa.bool_(),
)
TABLES = {"captions": CAPTIONS, "dead_letters": DEAD_LETTERS}


class CaptionSink(Datasink):  # type: ignore[misc]
    """Splits rows into the two tables; ``costs`` tells afterwards what each stage took."""

    def __init__(self, config: Config, run_id: str) -> None:
        self.costs: dict[str, StageCost] = {}
        self._output = config.output
        self._rows_per_file = config.rows_per_file
        self._same_in_every_row = {
            "model": config.model,
            "policy": config.policy,
            "prompt": config.prompt,
            "run_id": run_id,
        }

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_file

    def write(self, blocks: Iterable[Any], ctx: Any) -> dict[str, StageCost]:
        """What the stages took for the rows of this write task."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        rows = [table for table in tables if table.num_rows]
        if not rows:
            return {}
        whole = pa.concat_tables(rows)
        failed = pc.not_equal(whole["error_type"], "")
        for name, mask in (("captions", pc.invert(failed)), ("dead_letters", failed)):
            self._write(name, whole.filter(mask), f"part-{ctx.task_idx:06d}.parquet")
        return stage_costs(whole)

    def on_write_complete(self, write_result: Any) -> None:
        """Runs in the driver, with the results of all write tasks."""
        self.costs = added(write_result.write_returns)

    def _write(self, name: str, rows: pa.Table, file: str) -> None:
        if not rows.num_rows:
            return
        schema = TABLES[name]
        constants = self._same_in_every_row
        columns = [
            pa.repeat(constants[field.name], rows.num_rows)
            if field.name in constants
            else rows[field.name].cast(field.type)
            for field in schema
        ]
        write_table(pa.table(columns, schema=schema), self._output / name / file)


def check_output(output: Path) -> None:
    """Raise ConfigurationError where a run has been before."""
    left = [name for name in (MANIFEST, *TABLES) if (output / name).exists()]
    if left:
        state = "a run" if MANIFEST in left else "an unfinished run"
        raise ConfigurationError(
            f"--output {output} already holds {state} ({', '.join(left)}); "
            "name another folder, or remove that one"
        )


def prepare_output(output: Path) -> None:
    """Make the folders; raises ConfigurationError where they cannot be made or are there already."""
    check_output(output)
    try:
        for name in TABLES:
            (output / name).mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be made: {error.strerror}") from error


def fill_up(output: Path) -> None:
    """Give a table without any row one empty file, so that its schema can be read."""
    for name, schema in TABLES.items():
        if not any((output / name).glob("*.parquet")):
            write_table(schema.empty_table(), output / name / "part-000000.parquet")


def write_table(table: pa.Table, file: Path) -> None:
    """Write a file that appears whole or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    pq.write_table(table, aside, compression="zstd")
    os.replace(aside, file)
