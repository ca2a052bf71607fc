"""JSONL: an object a line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from hired.errors import ConfigurationError
from pipeline.sources import jsonl
from tests.pipeline.inputs import write_lines
from tests.pipeline.test_sources import items, keys, scanned


def test_a_line_is_a_row(tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "l.jsonl",
        {"image": "a.jpg", "key": "x"},
        b"",
        {"image": "/b.jpg"},
        {"image": "c", "key": 7},
    )
    found = items(lines)
    assert [item.key for item in found] == ["x", "l.jsonl#2", "7"]
    assert [item.file for item in found] == [f"{tmp_path}/a.jpg", "/b.jpg", f"{tmp_path}/c"]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}x", b"null", b'{"image": 7}', b'{"other": "a"}', b"\xff"])
def test_a_line_that_names_no_image_fails_alone(tmp_path: Path, line: bytes) -> None:
    found = items(write_lines(tmp_path / "l.jsonl", {"image": "a.jpg"}, line, {"image": "b.jpg"}))
    assert [item.failure is None for item in found] == [True, False, True]
    assert found[1].key == "l.jsonl#1"


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl.gz").write_bytes(gzip.compress(b'{"uri": "a.jpg"}\n{"uri": "b.jpg"}'))
    assert keys(tmp_path) == ["l.jsonl.gz#0", "l.jsonl.gz#1"]


def test_what_lies_before_damage_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "ROWS_PER_TABLE", 100)
    whole = gzip.compress(b'{"uri": "a.jpg"}\n' * 100_000)
    (tmp_path / "l.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = items(tmp_path)
    assert len(found) > 100
    assert [item.failure is None for item in found] == [True] * (len(found) - 1) + [False]


def test_fields_are_carried(tmp_path: Path) -> None:
    lines = [{"uri": "a", "n": 1, "q": "x", "tags": ["t"]}, {"uri": "b", "n": 0.5, "q": None}]
    rows = scanned(write_lines(tmp_path / "l.jsonl", *lines), columns=("n", "q", "tags"))
    assert rows["n"].to_pylist() == [1.0, 0.5]
    assert rows["q"].to_pylist() == ["x", None]
    assert rows["tags"].to_pylist() == [["t"], None]


def test_fields_of_several_types_are_refused(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "l.jsonl", {"uri": "a", "n": 1}, {"uri": "b", "n": "one"})
    with pytest.raises(ConfigurationError, match=r"l\.jsonl: the values of n are of several types"):
        scanned(lines, columns=("n",))


def test_lone_surrogates_are_written_out(tmp_path: Path) -> None:
    rows = scanned(
        write_lines(tmp_path / "l.jsonl", b'{"uri": "\\ud800.jpg", "q": "\\ud800"}'), columns=("q",)
    )
    assert rows["q"].to_pylist() == ["\\ud800"]


def test_a_line_without_an_end_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    lines = write_lines(tmp_path / "l.jsonl", {"uri": "a"}, {"uri": "b" * 1000})
    found = items(lines)
    assert [item.failure is None for item in found][-1] is False
