"""Every run's tables: read back by pyarrow, and with their images by the datasets library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import Failure
from pipeline.rows import Item
from pipeline.sinks import CAPTIONS, DEAD_LETTERS, SinkError
from pipeline.sinks.parquet import IMAGE, ParquetSink
from pipeline.storage import Store
from tests.pipeline.sinks.shards import GONE, UNREADABLE, Pictures, no_images, picture, shard, simple


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def files(store: Store) -> list[str]:
    return store.list()


def test_rows_lie_in_the_table_that_they_belong_to(store: Store) -> None:
    part = shard([("a", {"default": "a sign"}), ("b", {"default": UNREADABLE})])
    ParquetSink().write(part, store, no_images)
    assert files(store) == ["captions/part-000000.parquet", "dead_letters/part-000000.parquet"]
    captions, letters = (pq.read_table(store.uri(name)) for name in ("captions", "dead_letters"))
    assert captions.schema.equals(CAPTIONS)
    assert letters.schema.equals(DEAD_LETTERS)
    assert captions.to_pylist() == part.captions.to_pylist()
    assert letters["error"].to_pylist() == ["the image is empty (0 bytes)"]


def test_row_groups_hold_a_hundred_rows(store: Store) -> None:
    ParquetSink().write(simple(*map(str, range(250))), store, no_images)
    parquet = pq.ParquetFile(store.uri("captions/part-000000.parquet"))
    assert [parquet.metadata.row_group(group).num_rows for group in range(3)] == [100, 100, 50]
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"


def test_kept_columns_have_the_inputs_own_types(store: Store) -> None:
    sizes = pa.array([[1, 2], None], pa.list_(pa.int16()))
    part = shard(
        [("a", {"default": "x"}), ("b", {"default": "y"})],
        carried={"sizes": sizes, "unused": pa.array([1, 2])},
        kept=["sizes"],
    )
    ParquetSink().write(part, store, no_images)
    table = pq.read_table(store.uri("captions/part-000000.parquet"))
    assert table.column_names == [*CAPTIONS.names, "sizes"]
    assert table.schema.field("sizes").type == pa.list_(pa.int16())
    assert table["sizes"].to_pylist() == [[1, 2], None]


def test_a_table_without_any_row_can_be_read_all_the_same(store: Store) -> None:
    for number in range(2):
        part = shard([("b", {"default": UNREADABLE})], number=number, first_index=number)
        ParquetSink(keep_images=True).write(part, store, Pictures({}))
    assert files(store) == [
        "captions/part-000000.parquet",
        "dead_letters/part-000000.parquet",
        "dead_letters/part-000001.parquet",
    ]
    table = pq.read_table(store.uri("captions"))
    assert table.num_rows == 0
    assert table.column_names == [*CAPTIONS.names, "image"]


def test_dead_letters_go_when_their_rows_succeed_at_last(store: Store) -> None:
    failed = shard([("a", {"default": UNREADABLE})], number=3, first_index=9)
    ParquetSink().write(failed, store, no_images)
    assert files(store) == ["dead_letters/part-000003.parquet"]
    ParquetSink().write(simple("a", number=3, first_index=9), store, no_images)
    assert files(store) == ["captions/part-000003.parquet"]


def test_writing_again_writes_the_same_bytes(store: Store) -> None:
    images = Pictures({"a": picture("red"), "b": picture("blue", "PNG")})
    written = []
    for _ in range(2):
        ParquetSink(keep_images=True).write(simple("a", "b"), store, images)
        written.append([store.read(name) for name in files(store)])
    assert written[0] == written[1]


def test_datasets_load_captions_and_pictures(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = Pictures(
        {key: picture("red", kind) for key, kind in (("a", "JPEG"), ("b", "PNG"), ("c", "WEBP"))}
    )
    sink = ParquetSink(keep_images=True)
    sink.write(shard([("x", {"default": UNREADABLE})]), store, images)  # an empty file with the schema
    sink.write(simple("a", "b", number=1, first_index=1), store, images)
    sink.write(simple("c", number=2, first_index=3), store, images)
    loaded = datasets.load_dataset(
        "parquet",
        data_files=store.uri("captions/*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["caption"][:] == [f"a caption of {key}" for key in "abc"]
    assert [row["image"].format for row in loaded] == ["JPEG", "PNG", "WEBP"]
    assert loaded[0]["image"].size == (16, 12)


def test_an_image_is_in_each_row_that_asks_about_it_and_read_once(store: Store) -> None:
    images = Pictures({"a": picture("red"), "b": picture("blue")})
    part = shard([("a", {"short": "x", "long": "y"}), ("b", {"short": UNREADABLE, "long": "z"})])
    ParquetSink(keep_images=True).write(part, store, images)
    table = pq.read_table(store.uri("captions"))
    assert [row["bytes"] for row in table["image"].to_pylist()] == [images.by_key[key] for key in "aab"]
    assert table["image"][0]["path"].as_py() == "a"
    assert images.opened == ["a", "b"]


def test_an_image_that_is_gone_since_is_null_and_its_caption_stays(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    images = Pictures({"a": picture("red"), "b": GONE, "c": picture("red")})
    ParquetSink(keep_images=True).write(simple("a", "b", "c"), store, images)
    table = pq.read_table(store.uri("captions"))
    assert table["image"].is_null().to_pylist() == [False, True, False]
    assert table["caption"][1].as_py() == "a caption of b"
    assert "b was captioned, but its image cannot be read again: /in/b: FileNotFoundError" in caplog.text


def test_when_most_images_are_gone_no_file_is_written(store: Store) -> None:
    images = Pictures({"a": picture("red"), "b": GONE, "c": GONE})
    with pytest.raises(SinkError, match=r"2 of the 3 captioned images of shard 0 .*bring the input back"):
        ParquetSink(keep_images=True).write(simple("a", "b", "c"), store, images)
    assert files(store) == []


class Payload(bytes):
    """Bytes that are counted while they live."""

    alive = 0

    def __new__(cls, content: bytes) -> Payload:
        cls.alive += 1
        return super().__new__(cls, content)

    def __del__(self) -> None:
        Payload.alive -= 1


def test_only_a_row_group_of_images_is_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sinks.parquet.BYTES_PER_GROUP", 1000)
    most = 0

    def images(items: Sequence[Item]) -> Iterator[bytes | Failure]:
        nonlocal most
        for _ in items:
            yield Payload(bytes(100))
            most = max(most, Payload.alive)

    ParquetSink(keep_images=True).write(simple(*map(str, range(200))), store, images)
    assert 1 < most <= 12
    parquet = pq.ParquetFile(store.uri("captions/part-000000.parquet"))
    assert parquet.num_row_groups == 20
    assert parquet.schema_arrow.field("image").type == IMAGE.type
    assert pq.read_table(store.uri("captions"))["key"].to_pylist() == [str(row) for row in range(200)]
