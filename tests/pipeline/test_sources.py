"""An inventory holds every row of an input once, whatever the input is."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest

from hired.errors import ConfigurationError
from pipeline.sources import ROWS_PER_BLOCK, Inventory, sample_key, take_inventory
from tests.pipeline.inputs import IMAGE_STRUCT, write_parquet, write_tar


def keys(inventory: Inventory) -> list[str]:
    return [item.key for item in inventory.items()]


def test_a_folder_is_walked_and_keys_are_paths_below_it(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/er/a.jpg", ".hidden.jpg", ".cache/x.jpg", "._a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert keys(take_inventory(str(tmp_path))) == ["a.jpg", "b.PNG", "deep/er/a.jpg"]


def test_a_glob_keys_below_its_fixed_part(tmp_path: Path) -> None:
    for name in ("2019/a.jpg", "2020/a.jpg", "2020/b.png", "2020/more/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert keys(take_inventory(f"{tmp_path}/20*/*.jpg")) == ["2019/a.jpg", "2020/a.jpg"]
    assert keys(take_inventory(f"{tmp_path}/20*/**/*.jpg")) == ["2019/a.jpg", "2020/a.jpg", "2020/more/c.jpg"]
    assert keys(take_inventory(f"{tmp_path}/*20")) == ["2020/a.jpg", "2020/b.png", "2020/more/c.jpg"]


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "[2020]").mkdir()
    (tmp_path / "[2020]" / "a.jpg").write_bytes(b"")
    assert keys(take_inventory(f"{tmp_path}/[2020]")) == ["a.jpg"]


def test_a_single_file_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert keys(take_inventory(str(tmp_path / "a.jpg"))) == ["a.jpg"]


def test_other_files_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "notes.txt", "b.heic"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        inventory = take_inventory(str(tmp_path))
    assert inventory.ignored == ["b.heic", "notes.txt"]
    assert "2 other files: b.heic, notes.txt" in caplog.text


def test_dangling_links_are_rows_and_pipes_are_not(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert keys(take_inventory(str(tmp_path))) == ["gone.jpg"]


def test_names_that_are_not_utf_8_become_keys_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    inventory = take_inventory(str(tmp_path))
    assert keys(inventory) == ["caf\\udce9.jpg"]
    assert inventory.tables()[0]["file"][0].as_py() == os.fsencode(tmp_path / name)


def test_parquet_rows_are_keyed_by_their_key_column(tmp_path: Path) -> None:
    rows = [{"key": 7, "image": {"bytes": b"x", "path": "a.jpg"}}, {"key": None, "image": None}]
    file = write_parquet(tmp_path / "p.parquet", rows, key=pa.int64(), image=IMAGE_STRUCT)
    items = list(take_inventory(str(file)).items())
    assert [item.key for item in items] == ["7", "p.parquet#1"]
    assert [item.path for item in items] == ["p.parquet#a.jpg", "p.parquet#1"]


def test_parquet_rows_without_a_key_are_keyed_by_file_and_row(tmp_path: Path) -> None:
    for name in ("x/p.parquet", "y/p.parquet"):
        (tmp_path / name).parent.mkdir()
        write_parquet(tmp_path / name, [{"jpg": b"1"}, {"jpg": b"2"}, {"jpg": b"3"}], jpg=pa.large_binary())
    inventory = take_inventory(str(tmp_path))
    assert keys(inventory) == [f"{name}/p.parquet#{row}" for name in "xy" for row in range(3)]
    assert [len(block) for block in inventory.blocks] == [2, 1, 2, 1], "a block is a row group"


def test_the_image_column_must_be_clear(tmp_path: Path) -> None:
    row = {"left": b"1", "right": b"2", "text": "t"}
    file = write_parquet(tmp_path / "p.parquet", [row], left=pa.binary(), right=pa.binary(), text=pa.string())
    with pytest.raises(ConfigurationError, match=r"left, right.*--image-column"):
        take_inventory(str(file))
    assert [item.column for item in take_inventory(str(file), "right").items()] == ["right"]
    with pytest.raises(ConfigurationError, match=r"--image-column text.*it has left, right"):
        take_inventory(str(file), "text")


def test_a_parquet_file_without_images_is_no_input(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "metadata.parquet", [{"text": "t"}], text=pa.string())
    with pytest.raises(ConfigurationError, match=r"no images there.*metadata\.parquet \(no image column\)"):
        take_inventory(str(file))


def test_a_broken_parquet_file_is_one_failed_row(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and nothing more")
    (item,) = take_inventory(str(tmp_path)).items()
    assert item.failure is not None
    assert (item.failure.stage, item.failure.error_type) == ("read", "UnreadableFileError")


def test_tar_samples_are_keyed_up_to_their_first_dot(tmp_path: Path) -> None:
    members = {
        "s/001.jpg": b"1",
        "s/001.json": b"{}",
        "s/002.left.png": b"2",
        "s/.DS_Store": b"",
        "s/003.txt": b"3",
    }
    write_tar(tmp_path / "00000.tar", members)
    items = list(take_inventory(str(tmp_path)).items())
    assert [item.key for item in items] == ["s/001", "s/002", "s/003"]
    assert [item.path for item in items] == [
        f"00000.tar/s/{name}" for name in ("001.jpg", "002.left.png", "003.txt")
    ]
    assert [item.failure is None for item in items] == [True, True, False], "a sample without an image fails"


@pytest.mark.parametrize(
    ("member", "key"),
    [
        ("a.jpg", "a"),
        ("a.b.c.jpg", "a"),
        ("x.y/a.b.jpg", "x.y/a"),
        ("./a.jpg", "a"),
        (".a.jpg", ""),
        ("a", "a"),
    ],
)
def test_sample_keys_follow_webdataset(member: str, key: str) -> None:
    assert sample_key(member) == key


def test_what_lies_before_the_damage_of_a_tar_is_kept(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"1" * 512, "b.jpg": b"2" * 512})
    data = bytearray(tar.read_bytes())
    data[1024:1536] = b"\xff" * 512  # the second header
    tar.write_bytes(data)
    items = list(take_inventory(str(tmp_path)).items())
    assert [item.key for item in items] == ["a", "t.tar"]
    assert items[0].failure is None
    assert items[1].failure is not None


def test_two_rows_of_one_key_are_refused_and_both_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"001.jpg": b"1"})
    write_tar(tmp_path / "1.tar", {"001.png": b"1"})
    with pytest.raises(ConfigurationError, match=r"key '001': 0\.tar/001\.jpg and 1\.tar/001\.png"):
        take_inventory(str(tmp_path))


@pytest.mark.parametrize("source", ["absent", "absent/*.jpg", "."])
def test_an_input_without_images_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"--input {source.replace('*', '.')}"):
        take_inventory(source)


def test_blocks_are_small_and_tables_hold_every_row(tmp_path: Path) -> None:
    for number in range(ROWS_PER_BLOCK + 1):
        (tmp_path / f"{number:03}.jpg").write_bytes(b"")
    inventory = take_inventory(str(tmp_path))
    assert [table.num_rows for table in inventory.tables()] == [ROWS_PER_BLOCK, 1]
    assert len(inventory) == ROWS_PER_BLOCK + 1
