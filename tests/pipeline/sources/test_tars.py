"""WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.sources import sample_key
from tests.pipeline.inputs import write_tar
from tests.pipeline.test_sources import items, keys, scanned


def test_samples_are_keyed_up_to_their_first_dot(tmp_path: Path) -> None:
    members = {
        "s/001.jpg": b"1",
        "s/001.json": b"{}",
        "s/002.left.png": b"2",
        "s/.DS_Store": b"",
        "s/003.txt": b"3",
    }
    write_tar(tmp_path / "00000.tar", members)
    found = items(tmp_path)
    assert [item.key for item in found] == ["s/001", "s/002", "s/003"]
    assert [item.path for item in found] == [
        f"00000.tar/s/{name}" for name in ("001.jpg", "002.left.png", "003.txt")
    ]
    assert [item.failure is None for item in found] == [True, True, False], "a sample without an image fails"


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


def test_what_lies_before_the_damage_is_kept(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"1" * 512, "b.jpg": b"2" * 512})
    data = bytearray(tar.read_bytes())
    data[1024:1536] = b"\xff" * 512  # the second header
    tar.write_bytes(data)
    found = items(tmp_path)
    assert [item.key for item in found] == ["a", "t.tar"]
    assert found[0].failure is None
    assert found[1].failure is not None


def test_json_and_text_come_along_unasked(tmp_path: Path) -> None:
    members = {"a.jpg": b"", "a.json": b'{"n": 1}', "b.txt": "ähm".encode(), "b.jpg": b"", "c.jpg": b""}
    rows = scanned(write_tar(tmp_path / "t.tar", members))
    assert rows["json"].to_pylist() == ['{"n": 1}', None, None]
    assert rows["txt"].to_pylist() == [None, "ähm", None]


def test_tars_without_texts_carry_nothing(tmp_path: Path) -> None:
    rows = scanned(write_tar(tmp_path / "t.tar", {"a.jpg": b"", "b.cls": b"7", "b.jpg": b""}))
    assert not {"json", "txt"} & set(rows.column_names)


def test_fields_of_the_json_are_columns(tmp_path: Path) -> None:
    samples = [{"question": "why?", "score": 1}, {"question": "who?"}, "no object"]
    members = {}
    for number, sample in enumerate(samples):
        members |= {f"{number}.jpg": b"", f"{number}.json": json.dumps(sample).encode()}
    rows = scanned(write_tar(tmp_path / "t.tar", members), columns=("question", "score"))
    assert rows["question"].to_pylist() == ["why?", "who?", None]
    assert rows["score"].to_pylist() == [1, None, None]
    assert rows["json"].to_pylist() == [json.dumps(sample) for sample in samples]


def test_members_of_a_sample_that_lie_apart_are_one_sample(tmp_path: Path) -> None:
    assert keys(write_tar(tmp_path / "t.tar", {"a.jpg": b"", "b.jpg": b"", "a.cls": b"", "b.cls": b""})) == [
        "a",
        "b",
    ]


def test_long_names_and_large_members_are_found(tmp_path: Path) -> None:
    name = "folder/" * 30 + "x"
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix, size in ((".jpg", 3_000_000), (".json", 2)):
            member = tarfile.TarInfo(name + suffix)
            member.size = size
            tar.addfile(member, io.BytesIO(b"{}".ljust(size)))
    (item,) = items(tmp_path / "t.tar")
    assert (item.key, item.size) == (name, 3_000_000)
    assert scanned(tmp_path / "t.tar")["json"].to_pylist() == ["{}"]
    assert scanned(tmp_path / "t.tar").schema.field("json").type == pa.string()
