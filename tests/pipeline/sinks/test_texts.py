"""JSON lines, COCO's JSON and files of text, read back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.sinks.coco import CocoSink
from pipeline.sinks.jsonl import JsonLinesSink
from pipeline.sinks.parquet import ParquetSink
from pipeline.sinks.plain import plain, to_json
from pipeline.sinks.sidecars import SidecarSink
from pipeline.storage import Store
from tests.pipeline.sinks.shards import UNREADABLE, no_images, shard, simple


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def lines(store: Store, number: int = 0) -> list[dict[str, Any]]:
    data = store.read(f"jsonl/part-{number:06d}.jsonl").decode()
    return [json.loads(line) for line in data.split("\n")[:-1]]


def test_a_line_holds_all_columns_of_a_caption(store: Store) -> None:
    part = shard(
        [("ü", {"default": 'a "sign"\nand more'}), ("b", {"default": UNREADABLE}), ("c", {"default": "z"})],
        carried={"score": pa.array([0.5, 1.0, float("nan")])},
        kept=["score"],
    )
    JsonLinesSink().write(part, store, no_images)
    one, two = lines(store)
    assert one == part.captions.to_pylist()[0]
    assert (two["key"], two["score"]) == ("c", None)


def test_a_shard_that_lost_its_captions_loses_its_file(store: Store) -> None:
    JsonLinesSink().write(simple("a", number=2, first_index=4), store, no_images)
    assert [line["index"] for line in lines(store, 2)] == [4]
    JsonLinesSink().write(shard([("a", {"default": UNREADABLE})], number=2), store, no_images)
    assert store.list() == []


def test_whatever_an_input_carries_can_be_said_in_json() -> None:
    value = {
        "bytes": b"\xff\x00",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "exact": Decimal("1.10"),
        "nested": [{"inf": float("inf"), "none": None, "yes": True}],
    }
    assert plain(value) == {
        "bytes": "/wA=",
        "time": "2026-01-01T00:00:00+00:00",
        "exact": "1.10",
        "nested": [{"inf": None, "none": None, "yes": True}],
    }
    assert to_json({"a": "鯨"}) == '{"a": "鯨"}'


def coco(store: Store) -> dict[str, Any]:
    CocoSink().finish(store)
    loaded: dict[str, Any] = json.loads(store.read("captions.coco.json"))
    return loaded


def test_coco_lists_images_once_and_every_answer(store: Store) -> None:
    parts = [
        shard([("a", {"short": "x", "long": "y"}), ("b", {"short": UNREADABLE, "long": UNREADABLE})]),
        shard([("day/c.jpg", {"short": UNREADABLE, "long": "z"})], number=1, first_index=2),
    ]
    for part in parts:
        ParquetSink().write(part, store, no_images)
        CocoSink().write(part, store, no_images)
    whole = coco(store)
    assert whole["info"] == {
        "description": "Captions of images", "version": "1.0",
        "run_id": "run-1", "model": "m", "policy": "hired",
    }  # fmt: skip
    assert whole["licenses"] == []
    assert whole["images"] == [
        {"id": 0, "file_name": "a", "width": 16, "height": 12, "key": "a"},
        {"id": 2, "file_name": "day/c.jpg", "width": 16, "height": 12, "key": "day/c.jpg"},
    ]
    assert whole["annotations"] == [
        {"id": 1, "image_id": 0, "caption": "x", "prompt_id": "short"},
        {"id": 2, "image_id": 0, "caption": "y", "prompt_id": "long"},
        {"id": 3, "image_id": 2, "caption": "z", "prompt_id": "long"},
    ]


def test_coco_of_a_run_without_captions_is_well_formed(store: Store) -> None:
    ParquetSink().write(shard([("b", {"short": UNREADABLE})]), store, no_images)
    whole = coco(store)
    assert (whole["images"], whole["annotations"]) == ([], [])


def test_coco_of_many_shards_reads_them_in_order(store: Store) -> None:
    for number in range(3):
        keys = [f"{number}-{row}" for row in range(700)]
        ParquetSink().write(simple(*keys, number=number, first_index=700 * number), store, no_images)
    whole = coco(store)
    assert [image["id"] for image in whole["images"]] == list(range(2100))
    assert [each["image_id"] for each in whole["annotations"]] == list(range(2100))


def test_captions_lie_in_files_named_after_their_keys_below_the_output(store: Store, tmp_path: Path) -> None:
    keys = ["a.jpg", "a.png", "day/a.jpg", "../up", "/etc/passwd", "x.txt/y", "x"]
    SidecarSink().write(simple(*keys), store, no_images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = store.list()
    assert names == [
        "txt/%2E./up.txt",
        "txt/%2F/etc/passwd.txt",
        "txt/a.jpg.txt",
        "txt/a.png.txt",
        "txt/day/a.jpg.txt",
        "txt/x%2Etxt/y.txt",
        "txt/x.txt",
    ]
    assert sorted(store.read(name).decode() for name in names) == sorted(
        f"a caption of {key}" for key in keys
    )


def test_answers_to_further_questions_are_marked(store: Store) -> None:
    part = shard([("a", {"short": UNREADABLE, "long": "y"}), ("b", {"short": "x", "long": "z"})])
    SidecarSink("short").write(part, store, no_images)
    assert {name: store.read(name) for name in store.list()} == {
        "txt/a+long.txt": b"y",
        "txt/b.txt": b"x",
        "txt/b+long.txt": b"z",
    }
