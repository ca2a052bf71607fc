"""Both tables have their fixed schema whatever rows there were, and each row lies in one of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.block import BlockAccessor

from hired.errors import ConfigurationError
from hired.types import Caption
from pipeline import columns, sinks
from pipeline.columns import Failure
from pipeline.costs import StageCost, metered
from pipeline.sinks import CAPTIONS, DEAD_LETTERS, CaptionSink, fill_up, prepare_output
from tests.pipeline.inputs import config

CAPTION = Caption("a sign", (4, 5, 6), "stop", 30, 20, 9)
FAILURE = Failure("partition", "UnreadableImageError", "the image is empty (0 bytes)", False)


def block(rows: dict[str, Caption | Failure]) -> pa.Table:
    """What the last stage hands to the sink."""
    keys = np.array(list(rows), dtype=object)
    sizes = np.full(len(rows), 7, np.int32)
    batch = {"key": keys, "path": keys, "height": sizes, "width": sizes + 1}
    batch |= columns.of_captions(list(rows.values())) | metered("generate", len(rows), 0.0)
    table: pa.Table = BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
    return table


def write(output: Path, *blocks: pa.Table, task: int = 0) -> CaptionSink:
    sink = CaptionSink(config(output=output, model="m", policy="keep-all", prompt="?"), "run-1")
    cost = sink.write(blocks, SimpleNamespace(task_idx=task))
    sink.on_write_complete(SimpleNamespace(write_returns=[cost]))
    return sink


@pytest.fixture
def output(tmp_path: Path) -> Path:
    prepare_output(tmp_path / "out")
    return tmp_path / "out"


def test_rows_are_split_into_the_two_tables(output: Path) -> None:
    sink = write(output, block({"a": CAPTION, "b": FAILURE}), block({"c": FAILURE}))
    fill_up(output)
    captions, dead_letters = (pq.read_table(output / name) for name in sinks.TABLES)
    assert captions.to_pylist() == [
        {
            "key": "a", "path": "a", "width": 8, "height": 7, "model": "m", "policy": "keep-all",
            "prompt": "?", "caption": "a sign", "finish_reason": "stop", "prompt_tokens": 30,
            "visual_tokens_full": 20, "visual_tokens_kept": 9, "completion_tokens": 3, "run_id": "run-1",
        }
    ]  # fmt: skip
    assert dead_letters.to_pylist() == [
        {
            "key": key, "path": key, "stage": "partition", "error_type": "UnreadableImageError",
            "error": "the image is empty (0 bytes)", "retryable": False,
        }
        for key in "bc"
    ]  # fmt: skip
    assert sink.costs["generate"].rows == 3


@pytest.mark.parametrize("rows", [{"a": CAPTION}, {"a": FAILURE}, {}])
def test_schemas_are_the_same_without_rows_of_one_kind(
    output: Path, rows: dict[str, Caption | Failure]
) -> None:
    if rows:
        write(output, block(rows))
    fill_up(output)
    assert pq.read_table(output / "captions").schema.equals(CAPTIONS)
    assert pq.read_table(output / "dead_letters").schema.equals(DEAD_LETTERS)
    assert not any(pa.types.is_null(field.type) for field in [*CAPTIONS, *DEAD_LETTERS])


def test_a_write_task_without_rows_writes_nothing(output: Path) -> None:
    assert write(output, block({"a": CAPTION}).slice(0, 0)).costs == {}
    assert not list(output.rglob("*.parquet"))


def test_a_write_task_that_is_tried_again_doubles_no_rows(output: Path) -> None:
    for _ in range(2):
        write(output, block({"a": CAPTION}), task=3)
    write(output, block({"b": CAPTION}), task=4)
    assert pq.read_table(output / "captions")["key"].to_pylist() == ["a", "b"]
    assert not [file for file in output.rglob("*") if file.name.startswith(".")]


@pytest.mark.parametrize("left", ["captions/part-000000.parquet", "dead_letters/x", "manifest.json"])
def test_an_output_that_holds_a_run_is_never_written_to(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("precious")
    with pytest.raises(ConfigurationError, match=r"already holds .* run .*name another folder"):
        prepare_output(tmp_path)
    assert (tmp_path / left).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        prepare_output(tmp_path / "file" / "out")


def test_costs_add_up_over_write_tasks() -> None:
    sink = CaptionSink(config(), "run-1")
    part = {"read": StageCost(rows=2, busy_s=1.5, peak_rss_bytes=10)}
    sink.on_write_complete(
        SimpleNamespace(write_returns=[part, {}, {"read": StageCost(rows=1, busy_s=0.5, peak_rss_bytes=30)}])
    )
    assert sink.costs == {"read": StageCost(rows=3, busy_s=2.0, peak_rss_bytes=30)}
