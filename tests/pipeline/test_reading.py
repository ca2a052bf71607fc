"""Reading gives back the bytes that were written, and fails row by row."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import reading
from pipeline.columns import Failure, to_images
from pipeline.reading import ROWS_PER_PART, ReadStage
from pipeline.sources import take_inventory
from tests.pipeline.inputs import IMAGE_STRUCT, batches, config, write_parquet, write_tar


def read(source: Path, **options: object) -> dict[str, bytes | Failure]:
    stage = ReadStage(config(**options))
    read_rows: dict[str, bytes | Failure] = {}
    for block in batches(take_inventory(str(source))):
        parts = list(stage(block))
        assert sum(len(part["key"]) for part in parts) == len(block["key"])
        assert all(len(part["key"]) <= ROWS_PER_PART for part in parts)
        for part in parts:
            read_rows |= dict(zip(part["key"], to_images(part), strict=True))
    return read_rows


def error_type(row: bytes | Failure) -> str:
    assert isinstance(row, Failure)
    assert row.stage == "read"
    return row.error_type


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.gif").symlink_to("nowhere")
    rows = read(tmp_path)
    assert (rows["a.jpg"], rows["b.png"]) == (b"one", b"")
    assert error_type(rows["c.gif"]) == "FileNotFoundError"


def test_members_of_a_tar(tmp_path: Path) -> None:
    members = {f"{number:03}.jpg": os.urandom(number * 100) for number in range(40)}
    rows = read(write_tar(tmp_path / "t.tar", members))
    assert rows == {name.removesuffix(".jpg"): content for name, content in members.items()}


def test_a_tar_that_ends_early_fails_from_there_on(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"1" * 2000, "b.jpg": b"2" * 2000})
    tar.write_bytes(tar.read_bytes()[:4000])
    rows = read(tar)
    assert rows["a"] == b"1" * 2000
    assert error_type(rows["b"]) == "UnreadableImageError"


@pytest.mark.parametrize("group", [1, 7, 100])
def test_rows_of_a_parquet_file(tmp_path: Path, group: int) -> None:
    contents = [os.urandom(50 * number) for number in range(40)]
    rows = [{"image": {"bytes": content, "path": f"{number}.jpg"}} for number, content in enumerate(contents)]
    rows += [{"image": {"bytes": None, "path": "elsewhere.jpg"}}, {"image": None}]
    read_rows = read(write_parquet(tmp_path / "p.parquet", rows, group=group, image=IMAGE_STRUCT))
    assert [read_rows[f"p.parquet#{number}"] for number in range(40)] == contents
    assert [error_type(read_rows[f"p.parquet#{number}"]) for number in (40, 41)] == [
        "UnreadableImageError"
    ] * 2


def test_large_files_are_handed_on_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BYTES_PER_PART", 100)
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * 60)
    (block,) = batches(take_inventory(str(tmp_path)))
    assert [len(part["key"]) for part in ReadStage(config())(block)] == [2, 2, 1]


def test_a_plain_binary_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", [{"jpg": b"one"}, {"jpg": None}], jpg=pa.binary())
    rows = read(file)
    assert rows["p.parquet#0"] == b"one"
    assert error_type(rows["p.parquet#1"]) == "UnreadableImageError"


def test_damage_inside_a_parquet_file_fails_the_rows_after_it(tmp_path: Path) -> None:
    rows = [{"jpg": os.urandom(10_000)} for _ in range(8)]
    file = write_parquet(tmp_path / "p.parquet", rows, group=4, jpg=pa.binary())
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    file.write_bytes(data)
    read_rows = read(file)
    assert len(read_rows) == 8
    assert all(isinstance(read_rows[f"p.parquet#{number}"], Failure) for number in range(4))
    assert [read_rows[f"p.parquet#{number}"] for number in range(4, 8)] == [row["jpg"] for row in rows[4:]]


def test_files_above_the_limit_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "b.jpg").write_bytes(b"1234")
    write_tar(tmp_path / "t.tar", {"c.jpg": b"12345"})
    write_parquet(tmp_path / "p.parquet", [{"jpg": b"12345"}], jpg=pa.binary())
    rows = read(tmp_path, max_file_bytes=4)
    assert rows["b.jpg"] == b"1234"
    assert [error_type(rows[key]) for key in ("a.jpg", "c", "p.parquet#0")] == ["ImageTooLargeError"] * 3


def test_a_file_that_was_no_container_fails_as_one_row(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"\xff" * 1000)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    rows = read(tmp_path)
    assert {key: error_type(row) for key, row in rows.items()} == {
        "t.tar": "UnreadableFileError",
        "p.parquet": "UnreadableFileError",
    }
