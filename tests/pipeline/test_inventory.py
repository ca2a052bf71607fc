"""The inventory: numbered rows in their order, whatever is asked of them, and no key twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hired.errors import ConfigurationError
from pipeline import inventory as module
from pipeline.inventory import find_inventory, take_inventory
from pipeline.layout import Layout
from pipeline.storage import Store
from tests.pipeline.runs import inventory, rows


def whole(number: int) -> Layout:
    return Layout.of(number, 10, 20)


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 90))
def test_units_and_shards_divide_the_rows(num_rows: int, per_unit: int, per_file: int) -> None:
    layout = Layout.of(num_rows, per_unit, per_file)
    units = [row for unit in range(layout.num_units) for row in layout.unit_rows(unit)]
    shards = [row for shard in range(layout.num_shards) for row in layout.shard_rows(shard)]
    assert units == shards == list(range(num_rows))
    for shard in range(layout.num_shards):
        inside = [row for unit in layout.shard_units(shard) for row in layout.unit_rows(unit)]
        assert inside == list(layout.shard_rows(shard))
        assert {layout.shard_of_unit(unit) for unit in layout.shard_units(shard)} == {shard}
    assert layout.rows_per_shard <= max(per_file, per_unit)


def test_any_range_of_rows_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_PART", 7)
    tables = [rows(23).slice(start, 4) for start in range(0, 23, 4)]
    taken = take_inventory(Store(tmp_path), tables, whole)
    for start in range(23):
        for stop in range(start + 1, 24):
            read = taken.rows(range(start, stop))
            assert read["index"].to_pylist() == list(range(start, stop))
            assert read["key"].to_pylist() == [f"r{row}" for row in range(start, stop)]
    assert [block.num_rows for block in taken.blocks(range(2, 23), 8)] == [8, 8, 4, 1]
    assert (
        find_inventory(Store(tmp_path)) == taken or find_inventory(Store(tmp_path)).contents == taken.contents
    )  # type: ignore[union-attr]


def test_carried_columns_keep_their_types(tmp_path: Path) -> None:
    taken = inventory(tmp_path, 3, score=[1.5, None, 2.5], tags=[["a"], [], None])
    read = taken.rows(range(3))
    assert read["score"].to_pylist() == [1.5, None, 2.5]
    assert read.schema.field("tags").type == pa.list_(pa.string())


def test_two_rows_of_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    twice = rows(5).set_column(0, "key", pa.array(["a", "b", "c", "b", "d"]))
    with pytest.raises(ConfigurationError, match=r"'b': r1\.jpg and r3\.jpg.*--dedup"):
        take_inventory(Store(tmp_path), [twice], whole)
    assert find_inventory(Store(tmp_path)) is None


def test_equal_hashes_of_different_keys_are_no_duplicates(tmp_path: Path) -> None:
    taken = inventory(tmp_path, 4)
    module.check_keys(taken, np.zeros(4, np.uint64))


def test_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    table = rows(6).append_column("sha256", pa.array(["x", "y", "x", "", "", "y"]))
    taken = take_inventory(Store(tmp_path), [table.slice(0, 3), table.slice(3)], whole, dedup=True)
    assert taken.rows(range(4))["key"].to_pylist() == ["r0", "r1", "r3", "r4"]
    assert taken.contents.num_duplicates == 2


def test_a_sample_is_the_same_every_time_and_in_order(tmp_path: Path) -> None:
    tables = [rows(100).slice(start, 9) for start in range(0, 100, 9)]
    drawn = [
        take_inventory(Store(tmp_path / name), tables, whole, num_sampled=10, seed=seed)
        .rows(range(10))["key"]
        .to_pylist()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(key[1:]) for key in drawn[0]]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10


def test_a_sample_of_everything_is_everything(tmp_path: Path) -> None:
    taken = take_inventory(Store(tmp_path), [rows(5)], whole, num_sampled=50)
    assert taken.layout.num_rows == 5


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    tables = [rows(10).slice(start, 4) for start in range(0, 10, 4)]
    assert take_inventory(Store(tmp_path), tables, whole, limit=6).rows(range(6))["key"][-1].as_py() == "r5"
