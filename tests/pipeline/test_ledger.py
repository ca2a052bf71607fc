"""Commits: whatever is killed when, a run that goes on ends with every answer once."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.driving import Driver, here
from pipeline.ledger import Ledger, shard_file, unit_file
from pipeline.progress import Progress
from pipeline.publishing import AccountingError
from pipeline.storage import Store
from pipeline.work import Gatherer, RetryWork, UnitWork, all_slots
from tests.pipeline.runs import answers, inventory, publisher, questionnaire


class Killed(BaseException):
    """What a SIGKILL is to code that runs in a test: nothing catches it."""


class MortalStore(Store):
    """A store whose process dies before or after a certain write or deletion."""

    left = -1

    def write(self, name: str, data: bytes) -> None:
        self._die()
        super().write(name, data)
        self._die()

    def delete(self, *names: str) -> None:
        for name in names:
            self._die()
            super().delete(name)

    def _die(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def stored(folder: Path) -> list[tuple[str, str]]:
    """Key and prompt of every row of both tables."""
    found = []
    for name in ("captions", "dead_letters"):
        for file in sorted((folder / name).glob("*.parquet")):
            table = pq.read_table(file)
            found += list(zip(table["key"].to_pylist(), table["prompt_id"].to_pylist(), strict=True))
    return sorted(found)


@settings(max_examples=40)
@given(death=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_a_run_killed_at_any_write_and_begun_again_has_every_answer_once(
    tmp_path_factory: pytest.TempPathFactory, death: int, seed: int
) -> None:
    folder, draw = tmp_path_factory.mktemp("run"), random.Random(seed)
    taken, asked = inventory(folder, 17, per_unit=3, per_file=6), questionnaire("A?", "B?")
    for attempt in range(2):
        store = MortalStore(folder)
        store.left = death if attempt == 0 else -1
        mortal = publisher(type(taken)(store, taken.contents), asked)
        ledger = Ledger(store, taken.layout)
        driver = Driver(ledger, mortal, here, Progress(17, ledger.num_committed))
        try:
            driver.publish_what_is_complete()
            work = UnitWork(taken, asked, ledger.pending_units())
            slots = [slot for unit in work.pieces() for slot in work.slots(unit).tolist()]
            draw.shuffle(slots)
            failed = draw.sample(slots, len(slots) // 4)
            tables = [
                answers(slots[start : start + 5], 2, failed=failed) for start in range(0, len(slots), 5)
            ]
            driver.run(work, tables, lambda piece: None)
        except Killed:
            continue
        finally:
            driver.close()
    assert ledger.is_complete()
    assert stored(folder) == sorted((f"r{row}", f"q{number}") for row in range(17) for number in range(2))
    assert ledger.tally().counts.rows == 34
    assert store.list("_work/units") == []


def finished(folder: Path, failed: list[int]) -> tuple[Ledger, Driver, UnitWork]:
    taken, asked = inventory(folder, 10, per_unit=5, per_file=5), questionnaire()
    ledger = Ledger(Store(folder), taken.layout)
    driver = Driver(ledger, publisher(taken, asked), here, Progress(10, 0))
    work = UnitWork(taken, asked, ledger.pending_units())
    driver.run(work, [answers(range(10), failed=failed)], lambda piece: None)
    return ledger, driver, work


def test_what_may_succeed_another_time_is_tried_again_and_nothing_else(tmp_path: Path) -> None:
    ledger, driver, work = finished(tmp_path, failed=[1, 7, 8])
    assert ledger.tally().counts.retryable == 3
    assert ledger.retryable_shards(1) == [0, 1]
    again = RetryWork(work.inventory, work.questionnaire, [0, 1])
    assert [again.slots(shard).tolist() for shard in (0, 1)] == [[1], [7, 8]]
    driver.run(again, [answers([1, 7, 8], failed=[8], said="now")], lambda piece: None)
    counts = Ledger(Store(tmp_path), work.inventory.layout).tally().counts
    assert (counts.rows, counts.captions, counts.dead_letters) == (10, 9, 1)
    captions = pq.read_table(tmp_path / "captions")
    assert dict(zip(captions["key"].to_pylist(), captions["caption"].to_pylist(), strict=True))["r7"] == "now"
    assert captions["index"].to_pylist() == sorted(captions["index"].to_pylist())
    assert pq.read_table(tmp_path / "dead_letters")["key"].to_pylist() == ["r8"]
    assert ledger.retryable_shards(1) == []
    assert ledger.retryable_shards(2) == [1]


def test_answers_that_are_missing_or_strange_are_never_published(tmp_path: Path) -> None:
    taken, asked = inventory(tmp_path, 6, per_unit=3, per_file=6), questionnaire()
    ledger = Ledger(Store(tmp_path), taken.layout)
    ledger.commit_unit(0, answers([0, 1, 2]))
    ledger.commit_unit(1, answers([3, 4]))
    with pytest.raises(AccountingError, match="1 are missing"):
        publisher(taken, asked).publish(0, ledger.pieces(0), None)
    assert not Store(tmp_path).exists(shard_file(0))


def test_an_answer_that_comes_twice_counts_once(tmp_path: Path) -> None:
    taken, asked = inventory(tmp_path, 6), questionnaire()
    gatherer = Gatherer(UnitWork(taken, asked, [range(2)]))
    assert gatherer.add(answers([0, 1, 1])) == []
    [(piece, rows)] = gatherer.add(answers([1, 2]))
    assert (piece, rows["index"].to_pylist()) == (0, [0, 1, 2])
    assert gatherer.add(answers([0, 1, 2])) == [], "long since complete"
    assert gatherer.num_open == 0


def test_columns_of_the_input_lie_beside_their_captions(tmp_path: Path) -> None:
    taken = inventory(tmp_path, 4, per_unit=2, per_file=4, score=[1, 2, 3, 4])
    ledger, asked = Ledger(Store(tmp_path), taken.layout), questionnaire()
    for unit in range(2):
        ledger.commit_unit(unit, answers(taken.layout.unit_rows(unit), failed=[1]))
    record = publisher(taken, asked, keep=("score",)).publish(0, ledger.pieces(0), None)
    ledger.commit_shard(record)
    captions = pq.read_table(tmp_path / "captions")
    assert captions.select(["key", "score"]).to_pylist() == [
        {"key": "r0", "score": 1},
        {"key": "r2", "score": 3},
        {"key": "r3", "score": 4},
    ]
    assert not Store(tmp_path).exists(unit_file(0))


def test_neighbouring_units_are_told_together(tmp_path: Path) -> None:
    taken = inventory(tmp_path, 30, per_unit=3, per_file=6)
    ledger = Ledger(Store(tmp_path), taken.layout)
    for unit in (0, 4, 5):
        ledger.commit_unit(unit, answers(all_slots(taken.layout.unit_rows(unit), 1)))
    assert ledger.pending_units() == [range(1, 4), range(6, 10)]
    assert Ledger(Store(tmp_path), taken.layout).pending_units() == [range(1, 4), range(6, 10)]
    assert ledger.num_committed == 9
    assert ledger.publishable() == [2]
