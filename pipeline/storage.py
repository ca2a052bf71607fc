"""A folder that a run reads and writes, local or in S3: what is written is there whole or not at all.

| | this machine | S3 |
|---|---|---|
| one write | aside, fsync, rename, fsync of the folder | one PUT |
| a stream | the same | gathered in an unnamed local file, then uploaded |
| the lock | flock, which the system frees when its holder dies | a lease, see ``pipeline.leases`` |

A killed local write leaves ``.NAME.partial``, which no listing shows and the next write of NAME takes over.
A killed upload may leave parts, which nobody sees; let the bucket's lifecycle rules abort them after a day.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from pyarrow import fs

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.leases import Lease
from pipeline.s3 import StorageOptions

__all__ = ["StorageOptions", "Store", "filesystem"]

LOCK = "_work/lock"
PARTIAL = ".partial"
SPOOL_BYTES = 32 * 2**20


def filesystem(location: str, options: StorageOptions = StorageOptions()) -> tuple[Any, str]:  # noqa: B008
    """The pyarrow file system of a local path, a ``file://`` or an ``s3://`` URI, and the path in it."""
    if s3.is_s3(location):
        bucket, key = s3.split(location)
        return _s3(options, options.endpoint, bucket, os.getpid()), f"{bucket}/{key}".rstrip("/")
    return fs.LocalFileSystem(), local_path(location)


def local_path(location: str) -> str:
    """The path of a local location."""
    return location.removeprefix("file://")


@lru_cache(maxsize=16)
def _s3(options: StorageOptions, endpoint: str | None, bucket: str, process: int) -> Any:
    scheme, _, host = (endpoint or "").rstrip("/").rpartition("://")
    return fs.S3FileSystem(
        anonymous=options.s3_anonymous,
        region=_region(options, endpoint, bucket),
        endpoint_override=host or None,
        scheme=scheme or None,
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=options.attempts),
    )


def _region(options: StorageOptions, endpoint: str | None, bucket: str) -> str:
    """As given; or the bucket's own, since Amazon refuses requests that went to another one."""
    given = options.s3_region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if given or endpoint:
        return given or "us-east-1"
    with suppress(OSError):
        return str(fs.resolve_s3_region(bucket))
    return "us-east-1"


class Store:
    """A folder, local or ``s3://bucket/folder``. Names below it use "/". May be sent to workers."""

    def __init__(self, root: str | Path, options: StorageOptions = StorageOptions()) -> None:  # noqa: B008
        text = os.fspath(root)
        if s3.is_s3(text):
            s3.split(text)
        self.root = text.rstrip("/") if s3.is_s3(text) else os.path.abspath(local_path(text))
        self.options = options

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    @property
    def is_remote(self) -> bool:
        return s3.is_s3(self.root)

    def uri(self, name: str = "") -> str:
        """Where a name lies, for people and for pyarrow; raises ValueError where it leads elsewhere."""
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or _is_partial(name):
            raise ValueError(f"{name!r} is no name below {self.root}")
        return "/".join((self.root.rstrip("/"), *parts)) or "/"

    def sub(self, folder: str) -> Store:
        """The store of a folder below."""
        return Store(self.uri(folder), self.options)

    def read(self, name: str) -> bytes:
        """The whole file; raises FileNotFoundError."""
        if self.is_remote:
            return s3.get(self.uri(name), self.options)
        return Path(self.uri(name)).read_bytes()

    def open(self, name: str) -> Any:
        """A seekable pyarrow file, read by ranges; raises FileNotFoundError."""
        files, path = filesystem(self.uri(name), self.options)
        return files.open_input_file(path)

    def write(self, name: str, data: bytes) -> None:
        """The file appears whole or not at all, and what was there before is replaced."""
        if self.is_remote:
            s3.put(self.uri(name), data, self.options)
        else:
            with _written_aside(Path(self.uri(name))) as file:
                file.write(data)

    @contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """A stream whose file appears whole at its end, and not at all after an exception."""
        if not self.is_remote:
            with _written_aside(Path(self.uri(name))) as local:
                yield local
            return
        uri = self.uri(name)
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            yield cast(BinaryIO, spool)
            s3.upload(uri, spool, self.options)

    def exists(self, name: str) -> bool:
        """Whether a file has this name."""
        if self.is_remote:
            return s3.exists(self.uri(name), self.options)
        return os.path.isfile(self.uri(name))

    def list(self, folder: str = "") -> list[str]:
        """The sorted names, relative to the store, of all files below the folder; none if it is missing."""
        top = self.uri(folder)
        if self.is_remote:
            start = len(s3.split(self.root)[1]) + 1 if s3.split(self.root)[1] else 0
            keys = (each.key for each in s3.list_objects(top.rstrip("/") + "/", self.options))
            return sorted(key[start:] for key in keys if not key.endswith("/"))
        return sorted(
            os.path.relpath(os.path.join(parent, name), self.root)
            for parent, _, names in os.walk(top)
            for name in names
            if not _is_partial(name)
        )

    def delete(self, *names: str) -> None:
        """The files are gone; missing ones are fine."""
        if self.is_remote:
            s3.delete(self.root, [s3.split(self.uri(name))[1] for name in names], self.options)
            return
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self.uri(name))

    @contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """Held by one process at a time; raises ConfigurationError that names the ``owner`` who holds it."""
        if self.is_remote:
            with Lease(self.uri(LOCK), owner, self.options):
                yield
            return
        path = Path(self.uri(LOCK))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read() or "somebody"
                raise ConfigurationError(
                    f"{self.root} is being written by {holder}; wait for its end, or end it"
                ) from error
            file.truncate(0)
            file.write(owner)
            file.flush()
            yield


def _is_partial(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith(".") and base.endswith(PARTIAL)


@contextmanager
def _written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the path's place at the end; its leftovers are overwritten by the next."""
    _make_folders(path.parent)
    aside = path.with_name(f".{path.name}{PARTIAL}")
    with _owned(aside) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(aside)
            raise
    _sync_folder(path.parent)


def _owned(aside: Path) -> BinaryIO:
    """The file aside, empty, and locked against another writer of the same name."""
    while True:
        file = open(os.open(aside, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            # The writer before may have renamed it away while this one waited.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(aside)):
                file.truncate(0)
                return cast(BinaryIO, file)
        file.close()


def _make_folders(folder: Path) -> None:
    """The folder and those above it, each written into the one above for good."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
