"""A shard whose units are all there becomes output files.

Runs as often as it must: from the same pieces it writes the same files under the same names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hired.errors import HiredError
from pipeline.costs import added, stage_costs
from pipeline.inventory import Inventory
from pipeline.ledger import ShardRecord, deserialised
from pipeline.questions import Questionnaire
from pipeline.reading import ReadOptions, read
from pipeline.sinks import CAPTIONS, DEAD_LETTERS, Shard, Sink
from pipeline.tally import tally
from pipeline.work import Slots, all_slots, slots_of

GALLERY = "_work/gallery"


class AccountingError(HiredError):
    """Rows were lost, doubled or invented between input and output."""


@dataclass(frozen=True)
class Publisher:
    """Writes shards. ``constants`` are the columns that are the same in every caption."""

    inventory: Inventory
    questionnaire: Questionnaire
    sinks: Sequence[Sink]
    keep_columns: tuple[str, ...]
    constants: dict[str, str]
    reading: ReadOptions

    @property
    def needs_images(self) -> bool:
        return any(sink.needs_images for sink in self.sinks)

    def publish(self, number: int, pieces: Sequence[str], before: ShardRecord | None) -> ShardRecord:
        """The record of shard ``number``, whose files are written; ``before`` is that of its last time.

        Raises AccountingError unless each of its slots is answered exactly once.
        """
        store = self.inventory.store
        answers = pa.concat_tables([deserialised(store.read(piece)) for piece in pieces])
        rows = self.inventory.rows(self.inventory.layout.shard_rows(number))
        captions, dead_letters = self._split(answers, rows)
        costs = stage_costs(answers)
        if before is not None:
            captions, dead_letters = self._joined(number, captions, dead_letters)
            costs = added([before.tally.stages, costs])
        self._check(number, captions, dead_letters)
        shard = Shard(number, captions, dead_letters, rows)
        for sink in self.sinks:
            sink.write(shard, store, lambda items: read(items, self.reading))
        self._keep_samples(answers)
        return ShardRecord(
            shard=number,
            generation=0 if before is None else before.generation + 1,
            tally=tally(captions, dead_letters, costs),
        )

    def _split(self, answers: pa.Table, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Captions and dead letters, with the columns of the input that they keep."""
        ids = np.array([question.id for question in self.questionnaire.questions], dtype=object)
        answers = answers.append_column(
            "prompt_id", pa.array(ids[answers["question"].to_numpy()], pa.string())
        )
        for name, value in self.constants.items():
            answers = answers.append_column(name, pa.repeat(value, answers.num_rows))
        first = rows["index"][0].as_py()
        own = rows.select(list(self.keep_columns)).take(pc.subtract(answers["index"], first))
        failed = pc.not_equal(answers["error_type"], "")
        captions = pa.table(
            [*(answers[field.name].cast(field.type) for field in CAPTIONS), *own.columns],
            schema=pa.schema([*CAPTIONS, *own.schema]),
        )
        dead_letters = answers.select(DEAD_LETTERS.names).cast(DEAD_LETTERS)
        return captions.filter(pc.invert(failed)), dead_letters.filter(failed)

    def _joined(self, number: int, captions: pa.Table, dead_letters: pa.Table) -> tuple[pa.Table, pa.Table]:
        """With what is there of the shard already, of which the rows that were tried again are left out."""
        new = pa.array(np.concatenate([self._slots(captions), self._slots(dead_letters)]), pa.int64())
        joined = []
        for table, folder in ((captions, "captions"), (dead_letters, "dead_letters")):
            old = self._old(f"{folder}/part-{number:06d}.parquet", table.schema)
            kept = old.filter(pc.invert(pc.is_in(pa.array(self._slots(old), pa.int64()), new)))
            whole = pa.concat_tables([kept, table])
            joined.append(whole.take(np.argsort(self._slots(whole))))
        return joined[0], joined[1]

    def _old(self, name: str, schema: pa.Schema) -> pa.Table:
        store = self.inventory.store
        if not store.exists(name):
            return schema.empty_table()
        with store.open(name) as file:
            return pq.read_table(file, columns=schema.names).cast(schema)

    def _slots(self, table: pa.Table) -> Slots:
        numbers = {question.id: question.number for question in self.questionnaire.questions}
        question = [numbers[each] for each in table["prompt_id"].to_pylist()]
        return slots_of(
            pa.table({"index": table["index"], "question": pa.array(question, pa.int64())}), len(numbers)
        )

    def _check(self, number: int, captions: pa.Table, dead_letters: pa.Table) -> None:
        found = np.concatenate([self._slots(captions), self._slots(dead_letters)])
        expected = all_slots(self.inventory.layout.shard_rows(number), len(self.questionnaire))
        lost, extra = np.setdiff1d(expected, found), len(found) - len(np.unique(found))
        if len(lost) or extra or len(found) != len(expected):
            raise AccountingError(
                f"shard {number} has {len(found)} answers for {len(expected)} questions: "
                f"{len(lost)} are missing, {extra} came twice; "
                "remove its files below _work/units and run again"
            )

    def _keep_samples(self, answers: pa.Table) -> None:
        """Those answers that the report shows, with the tokens that were kept."""
        shown = answers.filter(pc.not_equal(answers["kept"], ""))
        for row in shown.select(["index", "key", "prompt", "caption", "kept"]).to_pylist():
            self.inventory.store.write(f"{GALLERY}/{row['index']:012d}.json", json.dumps(row).encode())
