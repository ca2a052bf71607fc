"""Files of buckets are found as those of folders are, and a store out of reach is no empty answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hired.errors import ConfigurationError
from pipeline.sources.files import File, find, unmatched
from pipeline.storage import StorageOptions
from tests.pipeline.inputs import write_parquet, write_tar
from tests.pipeline.s3 import S3Server, s3
from tests.pipeline.test_sources import items, keys, scanned

__all__ = ["s3"]

KEYS = ["2019/a.jpg", "2020/a.jpg", "2020/b.png", "2020/more/c.jpg", "[x]/d.jpg", "e f+é%20.jpg"]
HIDDEN = [".x/a.jpg", "2020/.a.jpg", "2020/", "2020/more/"]


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    uri = s3.make_bucket()
    s3.fill(uri, {f"in/{key}": b"" for key in KEYS + HIDDEN} | {"in2/x.jpg": b""})
    return uri


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("in", KEYS),
        ("in/", KEYS),
        ("", [f"in/{key}" for key in KEYS] + ["in2/x.jpg"]),
        ("in/2020", ["a.jpg", "b.png", "more/c.jpg"]),
        ("in/2020/b.png", ["b.png"]),
        ("in/[x]", ["d.jpg"]),
        ("in/20*/*.jpg", ["2019/a.jpg", "2020/a.jpg"]),
        ("in/20*/**/*.jpg", ["2019/a.jpg", "2020/a.jpg", "2020/more/c.jpg"]),
        ("in/*20", ["2020/a.jpg", "2020/b.png", "2020/more/c.jpg"]),
        ("in*/x.jpg", ["in2/x.jpg"]),
        ("in/e f+é%20.jpg", ["e f+é%20.jpg"]),
    ],
)
def test_a_bucket_is_walked_and_matched_like_a_folder(
    s3: S3Server, bucket: str, source: str, expected: list[str]
) -> None:
    assert keys(f"{bucket}/{source}", storage=s3.options) == expected


@pytest.mark.parametrize("source", ["in/absent", "in/*.tiff", "i"])
def test_what_is_not_in_a_bucket_is_refused(s3: S3Server, bucket: str, source: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--input s3://.*(no object or folder|no images) there"):
        keys(f"{bucket}/{source}", storage=s3.options)


def test_a_bucket_that_is_not_there_is_refused(s3: S3Server) -> None:
    with pytest.raises(ConfigurationError, match="no such bucket"):
        keys("s3://absent/in", storage=s3.options)


def test_without_credentials_the_mend_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    options = StorageOptions(s3_endpoint=s3.endpoint.replace("127.0.0.1", "localhost"))
    with pytest.raises(ConfigurationError, match="--s3-anonymous"):
        keys("s3://any/in", storage=options)


@pytest.mark.parametrize(
    ("path", "pattern", "rest"),
    [
        ("a/b.jpg", "a/*.jpg", 0),
        ("a/b.jpg", "a", 1),
        ("a/b/c.jpg", "*", 2),
        ("a/b/c.jpg", "**/*.jpg", 0),
        ("c.jpg", "**/*.jpg", 0),
        ("a/b/c.jpg", "**/b", 1),
        ("a/b/c.jpg", "a/*.jpg", None),
        ("a", "a/*", None),
    ],
)
def test_patterns_match_part_by_part(path: str, pattern: str, rest: int | None) -> None:
    assert unmatched(path.split("/"), pattern.split("/")) == rest


def test_a_table_that_a_glob_names_is_named(s3: S3Server, tmp_path: Path) -> None:
    uri = s3.make_bucket()
    s3.fill(uri, {"lists/a.jsonl": b'{"file_name": "a.jpg"}\n'})
    assert keys(f"{uri}/lists/*.jsonl", storage=s3.options) == ["a.jsonl#0"]
    with pytest.raises(ConfigurationError, match=r"a\.jsonl \(no field of URIs\)"):
        keys(f"{uri}/lists", storage=s3.options)


def test_relative_uris_in_a_bucket_are_objects_beside_their_list(s3: S3Server, tmp_path: Path) -> None:
    uri = s3.make_bucket()
    lines = [{"uri": each} for each in ("a.jpg", "../b.jpg", "./x/../c.jpg", "s3://other/d..jpg", "/e.jpg")]
    s3.fill(uri, {"lists/l.jsonl": "\n".join(map(json.dumps, lines)).encode()})
    assert [item.file for item in items(f"{uri}/lists/l.jsonl", storage=s3.options)] == [
        f"{uri}/lists/a.jpg",
        f"{uri}/b.jpg",
        f"{uri}/lists/c.jpg",
        "s3://other/d..jpg",
        "/e.jpg",
    ]


def test_tables_and_tars_of_a_bucket_carry_their_columns(s3: S3Server, tmp_path: Path) -> None:
    uri = s3.make_bucket()
    rows = [{"uri": "x.jpg", "q": "why?"}]
    files = {
        "p.parquet": write_parquet(tmp_path / "p", rows, uri=pa.string(), q=pa.string()).read_bytes(),
        "t.tar": write_tar(tmp_path / "t", {"a.jpg": b"1", "a.json": b'{"q": "who?"}'}).read_bytes(),
    }
    s3.fill(uri, files)
    with s3.faults(rate=0.2, seed=9):
        assert scanned(uri, columns=("q",), storage=s3.options)["q"].to_pylist() == ["why?", "who?"]
        assert scanned(f"{uri}/t.tar", storage=s3.options)["json"].to_pylist() == ['{"q": "who?"}']


def test_a_tar_in_a_bucket_is_not_fetched_whole(s3: S3Server, tmp_path: Path) -> None:
    members = {f"{number:03}.jpg": bytes(10_000) for number in range(50)}
    members |= {f"{number:03}.jpg": bytes(5_000_000) for number in range(50, 53)}
    uri = s3.make_bucket()
    s3.fill(uri, {"t.tar": write_tar(tmp_path / "t", members).read_bytes()})
    before = s3.num_requests
    assert len(keys(f"{uri}/t.tar", storage=s3.options)) == 53
    assert s3.num_requests - before < 25, "many headers come in one range"


@pytest.mark.parametrize("name", ["t.tar", "p.parquet", "l.jsonl"])
def test_an_outage_stops_the_scan_and_is_no_failed_row(s3: S3Server, tmp_path: Path, name: str) -> None:
    content: dict[str, Any] = {
        "t.tar": write_tar(tmp_path / "t", {"a.jpg": b"1"}).read_bytes(),
        "p.parquet": write_parquet(tmp_path / "p", [{"uri": "x"}], uri=pa.string()).read_bytes(),
        "l.jsonl": b'{"uri": "x"}\n',
    }
    uri = s3.make_bucket()
    s3.fill(uri, {name: content[name]})
    options = StorageOptions(s3_endpoint=s3.endpoint, attempts=1)
    file = File(f"{uri}/{name}", name)
    from pipeline.sources import KINDS, ScanOptions

    with s3.faults(rate=1.0, kinds=("internal-error",)), pytest.raises(OSError, match=r"AWS Error|after all"):
        list(KINDS[file.suffix](file, ScanOptions().wanted, options))
    assert len(list(find(file.location, options))) == 1
