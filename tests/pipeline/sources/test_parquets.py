"""Parquet files of images and of URIs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hired.errors import ConfigurationError
from pipeline.sources import parquets, tables
from tests.pipeline.inputs import IMAGE_STRUCT, write_lines, write_parquet
from tests.pipeline.test_sources import items, keys, scanned

URIS = {"uri": pa.string()}


def test_rows_are_keyed_by_their_key_column(tmp_path: Path) -> None:
    rows = [{"key": 7, "image": {"bytes": b"x", "path": "a.jpg"}}, {"key": None, "image": None}]
    file = write_parquet(tmp_path / "p.parquet", rows, key=pa.int64(), image=IMAGE_STRUCT)
    found = items(file)
    assert [item.key for item in found] == ["7", "p.parquet#1"]
    assert [item.path for item in found] == ["p.parquet#a.jpg", "p.parquet#1"]
    assert [(item.file, item.offset, item.column) for item in found] == [
        (str(file), 0, "image"),
        (str(file), 1, "image"),
    ]


def test_another_column_can_be_the_key(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", [{"uri": "a.jpg", "id": "x"}], id=pa.string(), **URIS)
    assert keys(file, key_column="id") == ["x"]
    with pytest.raises(ConfigurationError, match=r"--key-column name: .*p\.parquet has none; it has id, uri"):
        keys(file, key_column="name")


def test_rows_without_a_key_are_keyed_by_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquets, "ROWS_PER_TABLE", 2)
    for name in ("x/p.parquet", "y/p.parquet"):
        (tmp_path / name).parent.mkdir()
        write_parquet(tmp_path / name, [{"jpg": b"1"}, {"jpg": b"2"}, {"jpg": b"3"}], jpg=pa.large_binary())
    found = items(tmp_path)
    assert [item.key for item in found] == [f"{name}/p.parquet#{row}" for name in "xy" for row in range(3)]
    assert [item.offset for item in found] == [0, 1, 2, 0, 1, 2]


def test_the_image_column_must_be_clear(tmp_path: Path) -> None:
    row = {"left": b"1", "right": b"2", "text": "t"}
    file = write_parquet(tmp_path / "p.parquet", [row], left=pa.binary(), right=pa.binary(), text=pa.string())
    with pytest.raises(ConfigurationError, match=r"left, right.*--image-column"):
        items(file)
    assert [item.column for item in items(file, image_column="right")] == ["right"]
    with pytest.raises(ConfigurationError, match=r"--image-column text.*it has left, right"):
        items(file, image_column="text")


def test_a_file_without_images_is_no_input(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "metadata.parquet", [{"text": "t"}], text=pa.string())
    with pytest.raises(ConfigurationError, match=r"no images there.*metadata\.parquet \(no column of images"):
        items(file)


def test_a_broken_file_is_one_failed_row(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and nothing more")
    (item,) = items(tmp_path)
    assert item.failure is not None
    assert (item.failure.stage, item.failure.error_type) == ("read", "UnreadableFileError")


def test_what_lies_before_damage_is_kept(tmp_path: Path) -> None:
    rows = [{"uri": f"{number:050}.jpg"} for number in range(4000)]
    file = write_parquet(tmp_path / "p.parquet", rows, group=1000, **URIS)
    place = pq.ParquetFile(file).metadata.row_group(2).column(0).dictionary_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    file.write_bytes(data)
    found = items(file)
    assert [item.failure is None for item in found] == [True] * (len(found) - 1) + [False]
    assert [item.key for item in found[:-1]] == [f"p.parquet#{row}" for row in range(len(found) - 1)]


def test_uris_are_absolute_or_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    uris = ["a.jpg", "../b.jpg", "/c.jpg", "s3://x/d.jpg", "https://h/e.jpg", "file:///f.jpg", "S3://x/g.jpg"]
    file = write_parquet(tmp_path / "lists" / "p.parquet", [{"uri": uri} for uri in uris], **URIS)
    below = tmp_path / "lists"
    assert [item.file for item in items(file)] == [f"{below}/a.jpg", f"{below}/../b.jpg", *uris[2:]]


def test_a_row_whose_uri_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    rows = [
        {"uri": "a.jpg"},
        {"uri": None},
        {"uri": ""},
        {"uri": "gs://b/c.jpg"},
        {"uri": "data:image/png,x"},
    ]
    found = items(write_parquet(tmp_path / "p.parquet", rows, **URIS))
    assert [item.failure is None for item in found] == [True, False, False, False, False]
    assert [item.failure.error for item in found[1:] if item.failure] == [
        "the row names no image",
        "the row names no image",
        "only s3://, http://, https://, file:// and paths are read",
        "only s3://, http://, https://, file:// and paths are read",
    ]


def test_a_list_beside_its_images_does_not_double_them(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    list_file = write_parquet(tmp_path / "metadata.parquet", [{"file_name": "a.jpg"}], file_name=pa.string())
    write_lines(tmp_path / "captions.jsonl", {"file_name": "a.jpg"})
    assert keys(tmp_path) == ["a.jpg"]
    assert keys(list_file) == ["metadata.parquet#0"], "but the list itself is an input"


def test_the_column_of_uris_can_be_named(tmp_path: Path) -> None:
    row = {"uri": "a.jpg", "large": "b.jpg", "image": b"bytes"}
    file = write_parquet(
        tmp_path / "p.parquet", [row], uri=pa.string(), large=pa.large_string(), image=pa.binary()
    )
    assert [item.column for item in items(file)] == ["image"], "bytes at hand are taken first"
    assert [item.file for item in items(file, uri_column="large")] == [f"{tmp_path}/b.jpg"]
    with pytest.raises(ConfigurationError, match="--uri-column link"):
        items(file, uri_column="link")


def test_text_that_is_not_utf_8_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"caf\xe9.jpg", b"a.jpg"], pa.binary()).buffers()
    )
    pq.write_table(pa.table({"uri": broken}), tmp_path / "p.parquet")
    assert [item.path for item in items(tmp_path)] == [f"{tmp_path}/caf\\xe9.jpg", f"{tmp_path}/a.jpg"]


def test_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "uri": pa.array(["a.jpg", "b.jpg"]).dictionary_encode(),
            "question": ["why?", None],
            "tags": [["a"], []],
            "score": pa.array([0.5, 1.5], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    rows = scanned(tmp_path, columns=("score", "tags", "question"))
    assert rows.select(["question", "tags", "score"]) == table.select(["question", "tags", "score"])
    with pytest.raises(ConfigurationError, match="--keep-columns answer"):
        scanned(tmp_path, columns=("question", "answer"))


def test_a_large_file_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_TABLE", 10_000)
    numbers = pa.array(range(100_000)).cast(pa.string())
    pq.write_table(pa.table({"key": numbers, "uri": numbers}), tmp_path / "p.parquet")
    before = pa.total_allocated_bytes()
    from pipeline.sources import ScanOptions, scan

    most = num_rows = 0
    for rows in scan(str(tmp_path), ScanOptions()):
        num_rows += rows.num_rows
        most = max(most, pa.total_allocated_bytes() - before)
    assert num_rows == 100_000
    assert most < 16 * 2**20
