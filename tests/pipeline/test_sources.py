"""A scan gives every row of an input once, whatever the input is."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hired.errors import ConfigurationError
from pipeline.rows import SCHEMA, Item, to_items
from pipeline.sources import ScanOptions, files, scan, tables
from tests.pipeline.inputs import write_lines, write_parquet, write_tar


def scanned(source: object, **options: Any) -> pa.Table:
    return pa.concat_tables(list(scan(str(source), ScanOptions(**options))))


def items(source: object, **options: Any) -> list[Item]:
    return list(to_items(scanned(source, **options)))


def keys(source: object, **options: Any) -> list[str]:
    return [item.key for item in items(source, **options)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_folder_is_walked_and_keys_are_paths_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a.jpg", "deep/er/a.jpg", "c.heic", ".hidden.jpg", ".cache/x.jpg", "._a.jpg")
    assert keys(tmp_path) == ["a.jpg", "b.PNG", "c.heic", "deep/er/a.jpg"]
    assert keys(f"file://{tmp_path}") == keys(tmp_path)


def test_the_order_is_that_of_all_paths_sorted(tmp_path: Path) -> None:
    names = ["a-b.jpg", "a.jpg", "a/z.jpg", "a0.jpg", "b/c/d.jpg", "b/c.jpg"]
    touch(tmp_path, *reversed(names))
    assert keys(tmp_path) == sorted(names)


def test_a_glob_keys_below_its_fixed_part(tmp_path: Path) -> None:
    touch(tmp_path, "2019/a.jpg", "2020/a.jpg", "2020/b.png", "2020/more/c.jpg")
    assert keys(f"{tmp_path}/20*/*.jpg") == ["2019/a.jpg", "2020/a.jpg"]
    assert keys(f"{tmp_path}/20*/**/*.jpg") == ["2019/a.jpg", "2020/a.jpg", "2020/more/c.jpg"]
    assert keys(f"{tmp_path}/*20") == ["2020/a.jpg", "2020/b.png", "2020/more/c.jpg"]


def test_what_a_tar_brings_along_is_not_asked_of_other_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"t.jpg": b"", "t.txt": b"a cat"})
    write_lines(tmp_path / "1.jsonl", {"key": "j", "url": "x.jpg"})
    touch(tmp_path, "x.jpg")
    found = scanned(tmp_path)
    assert dict(zip(found["key"].to_pylist(), found["txt"].to_pylist(), strict=True)) == {
        "t": "a cat",
        "j": None,
        "x.jpg": None,
    }


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "[2020]/a.jpg")
    assert keys(f"{tmp_path}/[2020]") == ["a.jpg"]


def test_a_single_file_is_an_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    assert keys(tmp_path / "a.jpg") == ["a.jpg"]


def test_other_files_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.jpg", "notes.txt", "b.svg")
    with caplog.at_level(logging.WARNING):
        assert keys(tmp_path) == ["a.jpg"]
    assert "2 other files: b.svg, notes.txt" in caplog.text


def test_dangling_links_are_rows_and_pipes_are_not(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert keys(tmp_path) == ["gone.jpg"]


def test_names_that_are_not_utf_8_become_keys_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    rows = scanned(tmp_path)
    assert rows["key"].to_pylist() == ["caf\\udce9.jpg"]
    assert rows["file"][0].as_py() == os.fsencode(tmp_path / name)


def test_a_folder_that_cannot_be_listed_stops_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    real = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(files.os, "scandir", closed)
    with pytest.raises(ConfigurationError, match=r"closed cannot be listed \(Permission denied\)"):
        keys(tmp_path)


@pytest.mark.parametrize("source", ["absent", "absent/*.jpg", "."])
def test_an_input_without_images_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"--input {source.replace('*', '.')}"):
        keys(source)


def test_tables_are_small_and_hold_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.ROWS_PER_TABLE", 4)
    monkeypatch.setattr(tables, "ROWS_PER_TABLE", 4)
    touch(tmp_path, *(f"{number}.jpg" for number in range(6)))
    write_tar(tmp_path / "7.tar", {"a.jpg": b"", "b.jpg": b""})
    write_tar(tmp_path / "8.tar", {"c.jpg": b"", "d.jpg": b""})
    found = list(scan(str(tmp_path), ScanOptions()))
    assert [table.num_rows for table in found] == [4, 4, 2]
    assert all(table.schema == SCHEMA for table in found)


def test_the_bytes_can_be_the_key(tmp_path: Path) -> None:
    for name, content in (("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"1")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    rows = scanned(tmp_path, key="sha256")
    assert rows["sha256"].to_pylist() == [one, two, one, None]
    assert rows["key"].to_pylist() == [one, two, one, "gone.jpg"]
    assert rows["error_type"].to_pylist() == ["", "", "", "FileNotFoundError"]
    rows = scanned(tmp_path, dedup="sha256")
    assert rows["sha256"].to_pylist() == [one, two, one, None]
    assert rows["key"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg", "gone.jpg"]


def test_columns_are_carried_with_one_type_over_all_files(tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg")
    write_parquet(tmp_path / "1.parquet", [{"uri": "a.jpg", "n": 1}], uri=pa.string(), n=pa.int64())
    write_parquet(tmp_path / "2.parquet", [{"uri": "b.jpg", "n": 2}], uri=pa.string(), n=pa.int16())
    write_lines(tmp_path / "3.jsonl", {"uri": "c.jpg", "n": 3}, {"uri": "d.jpg"})
    rows = scanned(tmp_path, columns=("n",))
    assert rows["n"].to_pylist() == [None, 1, 2, 3, None]
    assert rows.schema.field("n").type == pa.int64()
    assert rows.column_names == [*SCHEMA.names, "n"]


def test_a_column_whose_type_changes_between_files_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", [{"uri": "a.jpg", "n": 1}], uri=pa.string(), n=pa.int64())
    write_parquet(tmp_path / "2.parquet", [{"uri": "b.jpg", "n": "?"}], uri=pa.string(), n=pa.string())
    with pytest.raises(ConfigurationError, match=r"2\.parquet: its column n is string"):
        scanned(tmp_path, columns=("n",))


def test_a_column_that_no_file_has_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg")
    with pytest.raises(ConfigurationError, match="the column question"):
        scanned(tmp_path, columns=("question",))


def test_a_carried_column_cannot_hide_one_of_the_rows() -> None:
    with pytest.raises(ConfigurationError, match="--keep-columns path"):
        ScanOptions(columns=("path", "n"))


def test_two_image_columns_at_once_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="exclude each other"):
        ScanOptions(image_column="a", uri_column="b")
