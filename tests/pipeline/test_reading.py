"""Reading gives back the bytes that were written, in order, and fails row by row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import reading
from pipeline.columns import Failure
from pipeline.fetching import FetchOptions
from pipeline.reading import ReadOptions
from pipeline.rows import Item, to_items
from pipeline.sources import ScanOptions, scan
from pipeline.storage import StorageOptions
from tests.pipeline.inputs import IMAGE_STRUCT, write_parquet, write_tar
from tests.pipeline.s3 import S3Server, s3

__all__ = ["s3"]


def read(source: object, options: ReadOptions | None = None) -> dict[str, bytes | Failure]:
    options = options or ReadOptions()
    items = [
        item for table in scan(str(source), ScanOptions(storage=options.storage)) for item in to_items(table)
    ]
    images = list(reading.read(items, options))
    return dict(zip([item.key for item in items], images, strict=True))


def error_type(row: bytes | Failure) -> str:
    assert isinstance(row, Failure)
    assert row.stage == "read"
    return row.error_type


def in_s3(server: S3Server, files: Mapping[str, bytes]) -> tuple[str, ReadOptions]:
    bucket = server.make_bucket()
    server.fill(bucket, files)
    return bucket, ReadOptions(storage=server.options)


def tar_bytes(folder: Path, members: Mapping[str, bytes]) -> bytes:
    return write_tar(folder / "t.tar", members).read_bytes()


def parquet_bytes(folder: Path, contents: Sequence[bytes], group: int = 7) -> bytes:
    file = write_parquet(
        folder / "p.parquet", [{"jpg": each} for each in contents], group=group, jpg=pa.binary()
    )
    return file.read_bytes()


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.gif").symlink_to("nowhere")
    rows = read(tmp_path)
    assert (rows["a.jpg"], rows["b.png"]) == (b"one", b"")
    assert error_type(rows["c.gif"]) == "FileNotFoundError"


def test_a_local_file_by_its_uri(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"one")
    (image,) = reading.read([Item("a", "a", f"file://{tmp_path}/a%20b.jpg")], ReadOptions())
    assert image == b"one"


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


@pytest.mark.parametrize("order", [[5, 3, 3, 39, 0], [0, 20, 39], [40], [-1, 0]])
def test_rows_of_a_parquet_file_in_any_order(tmp_path: Path, order: list[int]) -> None:
    contents = [os.urandom(50) for _ in range(40)]
    file = tmp_path / "p.parquet"
    file.write_bytes(parquet_bytes(tmp_path, contents))
    images = reading.read([Item(str(row), "", str(file), row, column="jpg") for row in order], ReadOptions())
    for row, image in zip(order, images, strict=True):
        if 0 <= row < 40:
            assert image == contents[row]
        else:
            assert error_type(image) == "UnreadableImageError"


def test_a_row_group_is_read_once_by_calls_that_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [os.urandom(50) for _ in range(40)]
    file = tmp_path / "p.parquet"
    file.write_bytes(parquet_bytes(tmp_path, contents, group=40))
    opened: list[object] = []
    real = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: object, **kwargs: object) -> Iterator[object]:
        opened.append(kwargs["row_groups"])
        return iter(real(self, *args, **kwargs))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    items = [Item(str(row), "", str(file), row, column="jpg") for row in range(40)]
    images = [
        image
        for start in range(0, 40, 10)
        for image in reading.read(items[start : start + 10], ReadOptions())
    ]
    assert images == contents
    assert opened == [[0]]


def test_a_plain_binary_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", [{"jpg": b"one"}, {"jpg": None}], jpg=pa.binary())
    rows = read(file)
    assert rows["p.parquet#0"] == b"one"
    assert error_type(rows["p.parquet#1"]) == "UnreadableImageError"


def test_damage_inside_a_parquet_file_fails_the_rows_of_its_group(tmp_path: Path) -> None:
    rows = [{"jpg": os.urandom(10_000)} for _ in range(8)]
    file = write_parquet(tmp_path / "p.parquet", rows, group=4, jpg=pa.binary())
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    file.write_bytes(data)
    read_rows = read(file)
    assert len(read_rows) == 8
    assert all(isinstance(read_rows[f"p.parquet#{number}"], Failure) for number in range(4))
    assert [read_rows[f"p.parquet#{number}"] for number in range(4, 8)] == [row["jpg"] for row in rows[4:]]


def test_a_parquet_file_that_is_gone_fails_its_rows(tmp_path: Path) -> None:
    items = [Item(str(row), "", str(tmp_path / "p.parquet"), row, column="jpg") for row in range(3)]
    assert [error_type(row) for row in reading.read(items, ReadOptions())] == ["FileNotFoundError"] * 3


def test_files_above_the_limit_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "b.jpg").write_bytes(b"1234")
    write_tar(tmp_path / "t.tar", {"c.jpg": b"12345"})
    write_parquet(tmp_path / "p.parquet", [{"jpg": b"12345"}], jpg=pa.binary())
    rows = read(tmp_path, ReadOptions(max_file_bytes=4))
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


def test_every_kind_of_input_in_s3_through_faults(s3: S3Server, tmp_path: Path) -> None:
    images = {f"{number:02}.jpg": os.urandom(1000 + number) for number in range(20)}
    bucket, options = in_s3(
        s3,
        {f"loose/{name}": content for name, content in images.items()}
        | {"loose/.hidden/x.jpg": b"", "loose/folder/": b""}
        | {
            "t.tar": tar_bytes(tmp_path, {f"t{name}": content for name, content in images.items()}),
            "p.parquet": parquet_bytes(tmp_path, list(images.values())),
        },
    )
    expected = {f"loose/{name}": content for name, content in images.items()}
    expected |= {f"t{name.removesuffix('.jpg')}": content for name, content in images.items()}
    expected |= {f"p.parquet#{row}": content for row, content in enumerate(images.values())}
    with s3.faults(rate=0.15, seed=4) as faults:
        assert read(bucket, options) == expected
    assert faults.seen.total() > 5


def test_objects_fail_one_by_one(s3: S3Server, tmp_path: Path) -> None:
    bucket, options = in_s3(s3, {"a.jpg": b"1234", "b.jpg": b"12345", "t.tar": b"12345"})
    options = ReadOptions(max_file_bytes=4, storage=options.storage)
    items = [
        Item("", "", f"{bucket}/{name}", offset, size)
        for name, offset, size in [
            ("a.jpg", 0, -1),
            ("b.jpg", 0, -1),
            ("c.jpg", 0, -1),
            ("t.tar", 3, 4),
            ("t.tar", 9, 4),
            ("t.tar", 1, 2),
            ("t.tar", 9, 0),
            ("t.tar", 0, 5),
        ]
    ]
    good, large, gone, short, beyond, member, nothing, also_large = reading.read(items, options)
    assert (good, member, nothing) == (b"1234", b"23", b"")
    assert [error_type(row) for row in (large, also_large)] == ["ImageTooLargeError"] * 2
    assert error_type(gone) == "FileNotFoundError"
    assert [error_type(row) for row in (short, beyond)] == ["UnreadableImageError"] * 2


def test_an_outage_fails_rows_that_may_be_tried_again(s3: S3Server) -> None:
    bucket, options = in_s3(s3, {"a.jpg": b"1"})
    options = ReadOptions(storage=StorageOptions(s3_endpoint=s3.endpoint, attempts=1))
    with s3.faults(rate=1.0, kinds=("internal-error",)):
        (row,) = reading.read([Item("a", "a", f"{bucket}/a.jpg")], options)
    assert isinstance(row, Failure)
    assert row.retryable


def test_neighbours_are_fetched_together_and_handed_on_in_order(s3: S3Server) -> None:
    files = {f"{number:03}.jpg": str(number).encode() for number in range(100)}
    bucket, options = in_s3(s3, files)
    items = [Item(name, name, f"{bucket}/{name}") for name in files]
    images = reading.read(items, options)
    before = s3.num_requests
    assert next(images) == b"0"
    images.close()  # type: ignore[attr-defined]
    assert s3.num_requests - before <= reading.MAX_IN_FLIGHT, (
        "no more than what may be in flight was asked for"
    )
    assert list(reading.read(items, options)) == list(files.values())


def test_urls_are_fetched(tmp_path: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/a.jpg"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"one" if found else b"404")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        items = [Item(name, name, f"{host}/{name}") for name in ("a.jpg", "b.jpg")]
        options = ReadOptions(http=FetchOptions(hosts=("127.0.0.1",)))
        found, missing = reading.read(items, options)
        (refused,) = reading.read(items[:1], ReadOptions())
        server.shutdown()
    assert found == b"one"
    assert error_type(missing) == "FetchError"
    assert error_type(refused) == "UnsafeUrlError"


def test_an_interrupted_body_is_not_taken_for_the_whole(s3: S3Server) -> None:
    data = os.urandom(50_000)
    bucket, options = in_s3(s3, {"a.jpg": data})
    with s3.faults(rate=0.5, seed=1, kinds=("cut",)) as faults:
        images = list(reading.read([Item("a", "a", f"{bucket}/a.jpg")] * 20, options))
    assert images == [data] * 20
    assert faults.seen["cut"] > 3
