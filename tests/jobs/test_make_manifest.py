"""A manifest holds every image of a bucket or a folder once, whatever happened while it was made."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hired.errors import ConfigurationError
from jobs.make_manifest import main
from pipeline import listing
from pipeline.listing import CUTS, ListingOptions, Task, make_manifest
from pipeline.rows import to_items
from pipeline.sources import ScanOptions, scan
from pipeline.storage import Store
from tests.pipeline.s3 import S3Server, s3

__all__ = ["s3"]


def names(count: int) -> list[str]:
    """Images in many small folders, in one large one, and among others."""
    rng = random.Random(1)
    flat = [f"flat/IMG_{number:06}.jpg" for number in range(count // 2)]
    deep = [f"deep/{rng.randrange(40):02}/{rng.randrange(9)}/{number}.PNG" for number in range(count // 4)]
    odd = [f"{rng.choice('aZ~_é-+ ')}{number}/x y%20.webp" for number in range(count // 8)]
    rest = [f"{number:x}.jpg" for number in range(count - len(flat) - len(deep) - len(odd))]
    return sorted(flat + deep + odd + rest)


OTHERS = ["notes.txt", "deep/list.csv", ".hidden/a.jpg", "flat/.x.jpg", "folder/"]


def fill(server: S3Server, keys: list[str]) -> str:
    bucket = server.make_bucket()
    server.fill(
        bucket, {f"top/{key}": b"12" for key in [*keys, *OTHERS]} | {"beside.jpg": b"", "top2/a.jpg": b""}
    )
    return bucket


def options(server: S3Server, bucket: str, output: Path, **more: Any) -> ListingOptions:
    return ListingOptions(f"{bucket}/top", str(output), storage=server.options, **more)


def check(manifest: Path, bucket: str, keys: list[str]) -> None:
    table = pq.read_table(manifest)
    assert table["key"].to_pylist() == keys
    assert table["uri"].to_pylist() == [f"{bucket}/top/{key}" for key in keys]
    assert set(table["size"].to_pylist()) == {2}
    assert table["etag"].null_count == table["modified"].null_count == 0
    assert table.schema == listing.SCHEMA


def test_twenty_thousand_keys_through_faults(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = names(20_000)
    bucket = fill(s3, keys)
    manifest = tmp_path / "out" / "m.parquet"
    arguments = ["--input", f"{bucket}/top", "--output", str(manifest), "--workers", "4"]
    before = s3.num_requests
    with s3.faults(rate=0.1, seed=6) as faults:
        assert main([*arguments, "--s3-endpoint", s3.endpoint]) == 0
    assert faults.seen.total() > 0
    check(manifest, bucket, keys)
    assert json.loads(capsys.readouterr().out) == {
        "manifest": str(manifest),
        "num_rows": 20_000,
        "num_bytes": 40_000,
        "num_ignored": 2,
    }
    assert os.listdir(manifest.parent) == ["m.parquet"], "the state went when it was not needed any more"
    assert s3.num_requests - before < 120, "folders are not entered for ever"


def test_the_manifest_is_an_input(s3: S3Server, tmp_path: Path) -> None:
    keys = names(40)
    bucket = fill(s3, keys)
    make_manifest(options(s3, bucket, tmp_path / "m.parquet"))
    table = pa.concat_tables(list(scan(str(tmp_path / "m.parquet"), ScanOptions(columns=("etag",)))))
    items = list(to_items(table))
    assert [item.key for item in items] == keys
    assert [item.file for item in items] == [f"{bucket}/top/{key}" for key in keys]
    assert table["etag"].null_count == 0


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_small_pages_split_and_enter_without_loss(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(listing, "KEYS_PER_PAGE", 7)
    monkeypatch.setattr(listing, "PAGES_BEFORE_SPLIT", 3)
    split: list[Task] = []
    real = Task.split
    monkeypatch.setattr(Task, "split", lambda task: split.append(task) or real(task))
    keys = names(400)
    bucket = fill(s3, keys)
    make_manifest(options(s3, bucket, tmp_path / "m.parquet", workers=workers))
    check(tmp_path / "m.parquet", bucket, keys)
    assert split or workers == 1


class KilledError(Exception):
    """Stands for the end of the process."""


def test_broken_off_at_any_commit_it_goes_on(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEYS_PER_PAGE", 20)
    monkeypatch.setattr(listing, "PAGES_BEFORE_SPLIT", 2)
    keys = names(600)
    bucket = fill(s3, keys)
    wanted = options(s3, bucket, tmp_path / "m.parquet", workers=3)
    real, rng, num_killed = listing._State.commit, random.Random(3), 0

    def commit(state: Any, *arguments: Any) -> Any:
        before = rng.random() < 0.1
        if before:
            raise KilledError
        left = real(state, *arguments)
        if rng.random() < 0.1:
            raise KilledError
        return left

    monkeypatch.setattr(listing._State, "commit", commit)
    while not (tmp_path / "m.parquet").exists():
        try:
            make_manifest(wanted)
        except KilledError:
            num_killed += 1
            assert os.listdir(tmp_path), "the state is there"
    assert num_killed > 5
    check(tmp_path / "m.parquet", bucket, keys)


KILLED = """
import os, signal, sys
from jobs.make_manifest import main
from pipeline import listing
listing.KEYS_PER_PAGE, real, left = 40, listing._State.commit, int(sys.argv[1])
def commit(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
listing._State.commit = commit
sys.exit(main(sys.argv[2:]))
"""


def test_killed_it_goes_on_and_neither_loses_nor_doubles(s3: S3Server, tmp_path: Path) -> None:
    keys = names(1000)
    bucket = fill(s3, keys)
    manifest = tmp_path / "m.parquet"
    arguments = ["--input", f"{bucket}/top", "--output", str(manifest), "--s3-endpoint", s3.endpoint]
    codes = [
        subprocess.run([sys.executable, "-c", KILLED, str(commits), *arguments], check=False).returncode
        for commits in (3, 9, 10_000)
    ]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    check(manifest, bucket, keys)


def test_killed_after_the_manifest_was_written_it_only_tidies_up(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = fill(s3, ["a.jpg"])
    wanted = options(s3, bucket, tmp_path / "m.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(listing.os, "unlink", lambda path: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            make_manifest(wanted)
    assert make_manifest(wanted).num_rows == 1
    assert os.listdir(tmp_path) == ["m.parquet"]


def test_a_manifest_in_s3_needs_a_state(s3: S3Server, tmp_path: Path) -> None:
    bucket = fill(s3, ["a.jpg"])
    output = f"{bucket}/manifests/m.parquet"
    with pytest.raises(ConfigurationError, match="--state"):
        ListingOptions(f"{bucket}/top", output)
    wanted = ListingOptions(f"{bucket}/top", output, str(tmp_path / "state"), storage=s3.options)
    assert make_manifest(wanted).manifest == output
    with Store(bucket, s3.options).open("manifests/m.parquet") as file:
        assert pq.read_table(file)["key"].to_pylist() == ["a.jpg"]
    assert os.listdir(tmp_path) == []


def test_a_folder_is_listed_as_a_scan_would(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("b.jpg", "a/c d.png", "a/100%/e.webp", "a/b.txt", ".hidden/x.jpg", "é/f.heic"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12")
    (root / "gone.jpg").symlink_to("nowhere")
    try:
        (root / os.fsdecode(b"caf\xe9")).mkdir()
        (root / os.fsdecode(b"caf\xe9/\xe9.jpg")).write_bytes(b"12")
    except OSError:
        pass  # this file system holds UTF-8 names only
    assert make_manifest(ListingOptions(str(root), str(tmp_path / "m.parquet"))).num_ignored == 1
    table = pq.read_table(tmp_path / "m.parquet")
    scanned = pa.concat_tables(list(scan(str(root), ScanOptions())))
    assert sorted(table["key"].to_pylist()) == sorted(scanned["key"].to_pylist())
    assert dict(zip(table["key"].to_pylist(), table["size"].to_pylist(), strict=True))["gone.jpg"] is None

    from pipeline.reading import ReadOptions, read

    listed = pa.concat_tables(list(scan(str(tmp_path / "m.parquet"), ScanOptions())))
    images = list(read(list(to_items(listed)), ReadOptions()))
    assert images.count(b"12") == table.num_rows - 1, "every file is found by its URI"


def test_other_suffixes_can_be_listed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"")
    output = str(tmp_path / "m.parquet")
    assert main(["--input", str(tmp_path / "in"), "--output", output, "--suffixes", "TAR"]) == 0
    assert pq.read_table(output)["key"].to_pylist() == ["a.tar"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"--input": "absent"}, "no such folder"),
        ({"--input": "s3://absent/x"}, "no such bucket"),
        ({"--output": "m.csv"}, "ends in .parquet"),
        ({"--workers": "0"}, "--workers 0"),
        ({"--input": "empty"}, "no images there"),
        ({"--output": "there.parquet"}, "exists"),
    ],
)
def test_what_cannot_be_done_is_said(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: Mapping[str, str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.parquet").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    given = {"--input": "in", "--output": "m.parquet"} | wrong
    assert main([word for pair in given.items() for word in pair]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "there.parquet").read_bytes() == b""


def test_two_listings_do_not_share_a_state(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    wanted = ListingOptions(str(tmp_path / "in"), str(tmp_path / "m.parquet"))
    state = listing._State(wanted.state_file, str(tmp_path / "in"), wanted.suffixes)
    with pytest.raises(ConfigurationError, match="another listing"):
        make_manifest(wanted)
    state.close()
    other = ListingOptions(str(tmp_path), str(tmp_path / "m.parquet"))
    with pytest.raises(ConfigurationError, match="belongs to a listing of"):
        make_manifest(other)
    assert make_manifest(wanted).num_rows == 1


def test_a_foreign_file_in_the_state_s_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a letter to my grandmother, which is longer than a header\n" * 10)
    wanted = ListingOptions(str(tmp_path), str(tmp_path / "m.parquet"), str(tmp_path / "state"))
    with pytest.raises(ConfigurationError, match="not the state of a listing"):
        make_manifest(wanted)
    assert (tmp_path / "state").read_text().startswith("a letter")


@pytest.mark.parametrize("until", ["", "flat/b", "flat/abz"])
def test_parts_of_a_split_task_meet_without_gap_or_overlap(until: str) -> None:
    task = Task("flat/", after="flat/aa", until=until, is_tree=True, depth=5)
    for _ in range(3):
        parts = task.split()
        assert parts[0].after == task.after
        assert parts[-1].until == task.until
        assert all(one.until == other.after for one, other in pairwise(parts))
        assert all(part.after < part.until for part in parts if part.until)
        task = parts[0]


def test_cuts_are_in_the_order_of_keys() -> None:
    assert list(CUTS) == sorted(CUTS)
    assert sqlite3.sqlite_version_info > (3, 8, 2), "tables without row ids"
