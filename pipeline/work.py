"""What a pass through the pipeline does: the rows to feed, in pieces, and the answers that complete a piece.

An answer is known by its slot, ``index * number of questions + question``. Every slot of a piece is answered
once, by a caption or a failure; then the piece is committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.columns import Failure
from pipeline.inventory import Inventory
from pipeline.ledger import Ledger
from pipeline.questions import QuestionError, Questionnaire, to_json
from pipeline.rows import SCHEMA

Slots = NDArray[np.int64]
# The columns with which a row enters the pipeline.
FED = pa.schema([("index", pa.int64()), *SCHEMA, ("questions", pa.string()), ("is_sample", pa.bool_())])


class Work(Protocol):
    """A pass: pieces by number, each with its rows to feed and its slots."""

    @property
    def inventory(self) -> Inventory: ...

    @property
    def questionnaire(self) -> Questionnaire: ...

    def pieces(self) -> Iterator[int]:
        """In the order in which they are fed."""

    def piece_of(self, index: Slots) -> Slots:
        """The pieces that rows belong to."""

    def slots(self, piece: int) -> Slots:
        """All slots of a piece, ascending."""

    def shard_of(self, piece: int) -> int: ...

    def commit(self, ledger: Ledger, piece: int, answers: pa.Table) -> None: ...


@dataclass(frozen=True)
class UnitWork:
    """The units that nobody has done yet."""

    inventory: Inventory
    questionnaire: Questionnaire
    units: Sequence[range]

    def pieces(self) -> Iterator[int]:
        for run in self.units:
            yield from run

    def piece_of(self, index: Slots) -> Slots:
        return index // self.inventory.layout.rows_per_unit

    def slots(self, piece: int) -> Slots:
        return all_slots(self.inventory.layout.unit_rows(piece), len(self.questionnaire))

    def shard_of(self, piece: int) -> int:
        return self.inventory.layout.shard_of_unit(piece)

    def commit(self, ledger: Ledger, piece: int, answers: pa.Table) -> None:
        ledger.commit_unit(piece, answers)


@dataclass(frozen=True)
class RetryWork:
    """What may succeed another time of published shards: a piece is a shard."""

    inventory: Inventory
    questionnaire: Questionnaire
    shards: Sequence[int]

    def pieces(self) -> Iterator[int]:
        yield from self.shards

    def piece_of(self, index: Slots) -> Slots:
        return index // self.inventory.layout.rows_per_shard

    def slots(self, piece: int) -> Slots:
        file = self.inventory.store.open(f"dead_letters/part-{piece:06d}.parquet")
        failed = pq.read_table(file, columns=["index", "prompt_id", "retryable"])
        failed = failed.filter(failed["retryable"])
        numbers = {question.id: question.number for question in self.questionnaire.questions}
        asked = np.array([numbers[each] for each in failed["prompt_id"].to_pylist()], np.int64)
        return np.sort(failed["index"].to_numpy() * len(numbers) + asked)

    def shard_of(self, piece: int) -> int:
        return piece

    def commit(self, ledger: Ledger, piece: int, answers: pa.Table) -> None:
        ledger.commit_retry(piece, answers)


def all_slots(rows: range, num_questions: int) -> Slots:
    return np.arange(rows.start * num_questions, rows.stop * num_questions)


def slots_of(answers: pa.Table, num_questions: int) -> Slots:
    """The slots of answers, in their order."""
    slots: Slots = answers["index"].to_numpy() * num_questions + answers["question"].to_numpy()
    return slots


def fed(work: Work, piece: int, block_size: int, samples: frozenset[int]) -> Iterator[pa.Table]:
    """The rows of a piece as they enter the pipeline, with their questions, in blocks."""
    slots, count = work.slots(piece), len(work.questionnaire)
    asked: dict[int, set[int]] = {}
    for slot in slots.tolist():
        asked.setdefault(slot // count, set()).add(slot % count)
    numbers = sorted(asked)
    for block in work.inventory.blocks(range(numbers[0], numbers[-1] + 1), block_size):
        rows = block.filter(pc.is_in(block["index"], pa.array(numbers)))
        if rows.num_rows:
            yield _with_questions(rows, work.questionnaire, asked, samples)


def _with_questions(
    rows: pa.Table, questionnaire: Questionnaire, asked: Mapping[int, set[int]], samples: frozenset[int]
) -> pa.Table:
    carried = rows.select(["index", *questionnaire.columns]).to_pylist()
    questions, failed = [], {}
    for place, row in enumerate(carried):
        wanted = asked[row["index"]]
        try:
            questions.append(to_json([each for each in questionnaire.of(row) if each.number in wanted]))
        except QuestionError as error:
            questions.append(to_json([each for each in questionnaire.questions if each.number in wanted]))
            failed[place] = Failure.of(error, "read")
    table = rows.select(["index", *SCHEMA.names])
    for name in ("stage", "error_type", "error", "retryable") if failed else ():
        table = _replaced(table, name, {place: getattr(failure, name) for place, failure in failed.items()})
    is_sample = [row["index"] in samples for row in carried]
    return table.append_column("questions", pa.array(questions, pa.string())).append_column(
        "is_sample", pa.array(is_sample, pa.bool_())
    )


def _replaced(table: pa.Table, name: str, values: Mapping[int, Any]) -> pa.Table:
    column = table[name].to_pylist()
    for place, value in values.items():
        column[place] = value
    return table.set_column(
        table.schema.get_field_index(name), name, pa.array(column, SCHEMA.field(name).type)
    )


class Gatherer:
    """Collects answers until a piece has all of its own. An answer that comes twice counts once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._parts: dict[int, list[pa.Table]] = {}
        self._missing: dict[int, set[int]] = {}
        self._complete: set[int] = set()

    def add(self, answers: pa.Table) -> list[tuple[int, pa.Table]]:
        """The pieces that these answers complete, each with all its answers in the order of their slots."""
        count = len(self._work.questionnaire)
        slots = slots_of(answers, count)
        pieces = self._work.piece_of(slots // count)
        complete = []
        for piece in sorted(set(pieces.tolist()) - self._complete):
            places = np.flatnonzero(pieces == piece)
            if self._put(piece, answers.take(places), slots[places].tolist()):
                complete.append((piece, self._take(piece)))
        return complete

    @property
    def num_missing(self) -> int:
        """Answers that are still to come to pieces that have some."""
        return sum(map(len, self._missing.values()))

    @property
    def num_open(self) -> int:
        """Pieces that have some of their answers."""
        return len(self._missing)

    def _put(self, piece: int, answers: pa.Table, slots: list[int]) -> bool:
        """Whether the piece is complete now."""
        if piece not in self._missing:
            self._missing[piece], self._parts[piece] = set(self._work.slots(piece).tolist()), []
        missing, new = self._missing[piece], []
        for place, slot in enumerate(slots):
            if slot in missing:
                missing.remove(slot)
                new.append(place)
        self._parts[piece].append(answers.take(new))
        return not missing

    def _take(self, piece: int) -> pa.Table:
        del self._missing[piece]
        self._complete.add(piece)
        whole = pa.concat_tables(self._parts.pop(piece))
        order = np.argsort(slots_of(whole, len(self._work.questionnaire)))
        return whole.take(order).combine_chunks()
