"""What is written to a store is there whole or not at all, on this machine and in S3."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hired.errors import ConfigurationError
from pipeline import leases
from pipeline import s3 as objects
from pipeline.leases import Holder, Lease
from pipeline.storage import StorageOptions, Store, filesystem
from tests.pipeline.s3 import S3Server, s3

__all__ = ["s3"]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "run")
    else:
        server: S3Server = request.getfixturevalue("s3")
        yield Store(f"{server.make_bucket()}/some/run/", server.options)


def test_what_was_written_is_read_listed_and_deleted(store: Store) -> None:
    store.write("b/2.bin", b"two")
    store.write("a.bin", b"one")
    with store.writer("b/3.bin") as file:
        file.write(b"th")
        file.write(b"ree")
    assert store.list() == ["a.bin", "b/2.bin", "b/3.bin"]
    assert store.list("b") == ["b/2.bin", "b/3.bin"]
    assert (store.read("a.bin"), store.read("b/3.bin")) == (b"one", b"three")
    assert store.exists("b/2.bin")
    assert not store.exists("b")
    assert store.sub("b").list() == ["2.bin", "3.bin"]
    store.write("a.bin", b"another")
    assert store.read("a.bin") == b"another"
    store.delete("a.bin", "b/2.bin", "never/there")
    assert store.list() == ["b/3.bin"]


def test_what_is_missing_is_said(store: Store) -> None:
    assert store.list("nowhere") == []
    assert not store.exists("nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.open("nothing")


def test_a_folder_whose_name_begins_like_another_is_not_listed_with_it(store: Store) -> None:
    store.write("part/1", b"")
    store.write("part-2/1", b"")
    assert store.list("part") == ["part/1"]


def write_half(store: Store, name: str) -> None:
    with store.writer(name) as file:
        file.write(b"half")
        raise RuntimeError("in the middle")


def test_a_stream_that_fails_leaves_nothing(store: Store) -> None:
    store.write("kept", b"before")
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError, match="in the middle"):
            write_half(store, name)
    assert store.list() == ["kept"]
    assert store.read("kept") == b"before"


def test_a_name_that_leads_elsewhere_is_refused(store: Store) -> None:
    for name in ("../other", "a/../../b", "/etc/passwd", ".x.partial"):
        with pytest.raises(ValueError, match="is no name below"):
            store.write(name, b"")


def test_a_store_travels_to_workers(store: Store) -> None:
    pickle.loads(pickle.dumps(store)).write("x", b"1")
    assert store.read("x") == b"1"


def test_pyarrow_reads_what_a_store_wrote(store: Store) -> None:
    table = pa.table({"n": list(range(1000))})
    with store.writer("t.parquet") as file:
        pq.write_table(table, file)
    files, path = filesystem(store.uri("t.parquet"), store.options)
    assert pq.read_table(path, filesystem=files) == table
    with store.open("t.parquet") as opened:
        assert pq.read_table(opened) == table


def test_streams_larger_than_memory_is_given_come_whole(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.SPOOL_BYTES", 1000)
    store, data = Store(s3.make_bucket(), s3.options), os.urandom(17 * 2**20)
    with s3.faults(rate=0.3, seed=5), store.writer("large") as file:
        file.write(data)
    assert store.read("large") == data


def test_a_local_location_may_be_a_uri(tmp_path: Path) -> None:
    assert Store(f"file://{tmp_path}/run").root == str(tmp_path / "run")


def test_a_bucket_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket/folder"):
        Store("s3://")


@pytest.mark.parametrize("options", [{"attempts": 0}, {"s3_endpoint": "localhost:9000"}])
def test_wrong_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        StorageOptions(**options)  # type: ignore[arg-type]


WRITE_FOR_EVER = """
import sys
from pipeline.storage import Store
store = Store(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"ab":
        store.write("x", bytes([letter]) * 50_000)
"""


def test_a_killed_writer_leaves_a_whole_file_and_no_leftover_that_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("x", b"a" * 50_000)
    for delay_s in (0.01, 0.05):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay_s)
        writer.kill()
        writer.wait()
        assert store.read("x") in (b"a" * 50_000, b"b" * 50_000)
        assert store.list() == ["x"]
    store.write("x", b"the last")
    assert os.listdir(tmp_path) == ["x"], "the leftover went with the next write of its name"


def test_writers_of_one_name_wait_for_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    contents = [bytes([letter]) * 200_000 for letter in b"abcdefgh"]
    threads = [threading.Thread(target=store.write, args=("x", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("x") in contents
    assert os.listdir(tmp_path) == ["x"]


def test_one_holds_the_lock_and_is_named_to_the_others(store: Store) -> None:
    second = store.lock("another")
    with store.lock("run 7 on node-3"), pytest.raises(ConfigurationError, match="run 7 on node-3"):
        second.__enter__()
    with store.lock("another"):
        pass


HOLD_FOR_EVER = """
import sys, time
from pipeline.storage import Store, StorageOptions
with Store(sys.argv[1], StorageOptions(s3_endpoint=sys.argv[2] or None)).lock("the killed one"):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_the_lock_of_a_killed_process_is_free_at_once(store: Store) -> None:
    endpoint = store.options.s3_endpoint or ""
    command = [sys.executable, "-c", HOLD_FOR_EVER, store.root, endpoint]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigurationError, match="the killed one"), store.lock("the next one"):
        raise AssertionError("two hold the lock")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with store.lock("the next one"):
        pass


def test_a_lease_from_elsewhere_is_taken_over_when_it_is_old(s3: S3Server) -> None:
    uri = f"{s3.make_bucket()}/lock"
    elsewhere = Holder("run 1 on node-9", "node-9", 1, "token")
    objects.put(uri, elsewhere.dump(), s3.options)
    with pytest.raises(ConfigurationError, match="run 1 on node-9"), Lease(uri, "run 2", s3.options):
        raise AssertionError("two hold the lease")
    time.sleep(1.1)  # the store tells time in seconds
    with Lease(uri, "run 2", s3.options, lease_s=0.5):
        assert b"run 2" in objects.get(uri, s3.options)
    assert not objects.exists(uri, s3.options)


def test_a_lease_is_kept_by_its_heartbeat_through_faults(s3: S3Server) -> None:
    uri, lost = f"{s3.make_bucket()}/lock", threading.Event()
    lease = Lease(uri, "run 1", s3.options, heartbeat_s=0.05, on_loss=lost.set)
    with s3.faults(rate=0.3, seed=1) as faults, lease:
        first, deadline_s = s3.modified(uri), time.monotonic() + 20
        while s3.modified(uri) == first:
            assert time.monotonic() < deadline_s, "the lease was never renewed"
            time.sleep(0.1)
    assert faults.seen.total() > 0
    assert not lost.is_set()


def test_who_loses_a_lease_is_told_and_leaves_the_other_alone(s3: S3Server) -> None:
    uri, lost = f"{s3.make_bucket()}/lock", threading.Event()
    other = Holder("run 2", "node-9", 1, "token").dump()
    with Lease(uri, "run 1", s3.options, heartbeat_s=0.05, on_loss=lost.set):
        objects.put(uri, other, s3.options)
        assert lost.wait(5)
    assert objects.get(uri, s3.options) == other


def test_of_many_who_want_a_lease_one_gets_it(s3: S3Server) -> None:
    uri, held, refused = f"{s3.make_bucket()}/lock", [], []
    done = threading.Barrier(6)

    def contend(number: int) -> None:
        try:
            with Lease(uri, f"run {number}", s3.options):
                held.append(number)
                done.wait(20)
        except ConfigurationError:
            refused.append(number)
            done.wait(20)

    with s3.faults(rate=0.2, seed=2):
        threads = [threading.Thread(target=contend, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_a_holder_that_runs_is_not_gone_and_one_elsewhere_may_run() -> None:
    assert not Holder.this_process("me").is_gone()
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    assert process.pid is not None
    assert Holder("it", leases._host(), process.pid, "").is_gone()
    assert not Holder("it", "elsewhere", process.pid, "").is_gone()


def test_faults_of_the_store_are_tried_again(s3: S3Server) -> None:
    store = Store(s3.make_bucket(), s3.options)
    with s3.faults(rate=0.25, seed=3) as faults:
        for number in range(25):
            store.write(f"{number:03}", os.urandom(2000))
        assert len(store.list()) == 25
        assert all(len(store.read(name)) == 2000 for name in store.list())
        store.delete(*store.list())
    assert store.list() == []
    assert len(faults.seen) == 4, f"every kind of fault was met: {faults.seen}"


def test_a_store_that_stays_broken_is_an_error_that_names_the_object(s3: S3Server) -> None:
    store = Store(s3.make_bucket(), StorageOptions(s3_endpoint=s3.endpoint, attempts=2))
    store.write("x", b"1")
    with s3.faults(rate=1.0, kinds=("slow-down",)), pytest.raises(OSError, match=r"/x: SlowDown after all"):
        store.read("x")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        Store("s3://absent", s3.options).read("x")


def test_ranges_are_read_and_limits_kept(s3: S3Server) -> None:
    uri = f"{s3.make_bucket()}/x"
    objects.put(uri, b"0123456789", s3.options)
    assert objects.get(uri, s3.options, start=3, size=4) == b"3456"
    assert objects.get(uri, s3.options, start=8, size=4) == b"89"
    assert objects.get(uri, s3.options, start=3, size=0) == b""
    with pytest.raises(EOFError):
        objects.get(uri, s3.options, start=10, size=1)
    with pytest.raises(OverflowError):
        objects.get(uri, s3.options, limit=9)
