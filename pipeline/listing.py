"""A manifest of a bucket or a folder, listed once: parquet of key, uri, size, etag, modified, in key order.

Listing a hundred million objects takes hours, and a job that reads a manifest need not do it again. So it is
done in parallel and can be continued: each answer of the store, and where to go on after it, is one
transaction of an SQLite file beside the manifest. Killed at any moment, the same call lists the rest.

    folders are entered one by one until all workers have enough to do;
    then whole folders, many small ones together, are listed with all that is below them, and
    what is still not done when workers are idle is split at the next character of its keys.

Objects that change while they are listed may be seen or not, as in any listing.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.columns import printable
from pipeline.s3 import StorageOptions
from pipeline.sources.files import IMAGE_SUFFIXES, is_file
from pipeline.storage import Store, local_path

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),  # null for local files
        ("modified", pa.timestamp("us", "UTC")),
    ]
)
ROWS_PER_GROUP = 50_000
KEYS_PER_PAGE = 1000
# Open tasks for each worker, above which folders are listed whole instead of being entered.
TASKS_PER_WORKER = 4
PAGES_BEFORE_TREE = 5
PAGES_BEFORE_SPLIT = 10
# Where keys are cut in two; any other characters fall between these.
CUTS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
LAST_CHARACTER = "\U0010ffff"  # sorts behind everything in a folder
LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class ListingOptions:
    """What is listed, by how many requests at once, and where the state is kept."""

    source: str
    output: str
    state: str | None = None
    workers: int = 16
    suffixes: frozenset[str] = IMAGE_SUFFIXES
    storage: StorageOptions = field(default_factory=StorageOptions)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigurationError(f"--workers {self.workers}: give 1 or more")
        if not self.output.endswith(".parquet"):
            raise ConfigurationError(f"--output {self.output}: name a file that ends in .parquet")
        if s3.is_s3(self.output) and self.state is None:
            raise ConfigurationError("--output in S3 needs --state, a local file from which to go on")

    @property
    def store(self) -> tuple[Store, str]:
        """The folder of the manifest, and its name there."""
        folder, _, name = self.output.rpartition("/")
        return Store(folder or ".", self.storage), name

    @property
    def state_file(self) -> Path:
        store, name = self.store
        return Path(self.state) if self.state else Path(store.root) / f".{name}.listing"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a manifest holds; ``num_ignored`` counts files of other suffixes."""

    manifest: str
    num_rows: int
    num_bytes: int
    num_ignored: int


@dataclass(frozen=True, slots=True)
class Task:
    """Keys below a folder: greater than ``after``, and not greater than ``until`` where that is given.

    ``start`` is where ``after`` began; with the folder it names the task. ``is_tree``: and all below.
    Keys are cut at the character number ``depth`` when the task is split.
    """

    folder: str
    start: str = ""
    after: str = ""
    until: str = ""
    is_tree: bool = False
    depth: int = 0
    num_pages: int = 0

    def split(self) -> list[Task]:
        """The same keys in several tasks, of which the first is this one, shortened."""
        base, first = self.after[: self.depth], self.after[self.depth : self.depth + 1]
        cuts = [base + cut for cut in CUTS if cut > first and not (self.until and base + cut >= self.until)]
        ends = [*cuts, self.until]
        own = replace(self, until=ends[0], depth=self.depth + 1, num_pages=0)
        return [own] + [
            Task(self.folder, start=cut, after=cut, until=end, is_tree=True, depth=self.depth + 1)
            for cut, end in zip(cuts, ends[1:], strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the listing; ``key`` is its path below the root."""

    key: str
    uri: str
    size: int | None
    etag: str | None
    modified_us: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """An answer: files, folders that were not entered, and the key to go on after, None at the end."""

    files: list[Found]
    folders: list[str]
    after: str | None


class Root(Protocol):
    """Where a listing starts."""

    @property
    def uri(self) -> str:
        """The root's own."""

    @property
    def has_trees(self) -> bool:
        """Whether a step may list what is below its folder, in the order of keys."""

    def step(self, task: Task) -> Step:
        """The next files of a task."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket, or a folder of one; its URI ends in a slash."""

    uri: str
    storage: StorageOptions
    has_trees: ClassVar[bool] = True

    def step(self, task: Task) -> Step:
        bucket, top = s3.split(self.uri)
        page = s3.list_page(
            self.uri + task.folder,
            self.storage,
            delimiter="" if task.is_tree else "/",
            start_after=top + task.after if task.after else "",
            max_keys=KEYS_PER_PAGE,
        )
        keys = [each.key[len(top) :] for each in page.objects]
        folders = [each[len(top) :] for each in page.folders]
        files = [
            Found(key, f"{s3.SCHEME}{bucket}/{each.key}", each.size, each.etag, _microseconds(each.modified))
            for key, each in zip(keys, page.objects, strict=True)
            if not key.endswith("/") and not (task.until and key > task.until)
        ]
        last = max([*keys, *(folder + LAST_CHARACTER for folder in folders)], default=task.after)
        is_done = page.token is None or (task.until != "" and last >= task.until)
        return Step(files, folders, None if is_done else last)


@dataclass(frozen=True, slots=True)
class Folder:
    """A local folder, without a slash at its end; links to folders are not followed."""

    uri: str
    has_trees: ClassVar[bool] = False

    def step(self, task: Task) -> Step:
        """All of one folder: a file system has no pages."""
        try:
            with os.scandir(os.path.join(self.uri, os.fsdecode(_raw(task.folder)))) as entries:
                found = [(each, each.is_dir(follow_symlinks=False)) for each in entries]
        except OSError as error:
            raise ConfigurationError(
                f"{self.uri}/{task.folder} cannot be listed ({error.strerror}); see to its permissions"
            ) from error
        folders = [task.folder + _text(each.name) + "/" for each, is_folder in found if is_folder]
        files = [
            self._file(each, task.folder) for each, is_folder in found if not is_folder and is_file(each)
        ]
        return Step(files, folders, None)

    def _file(self, entry: os.DirEntry[str], folder: str) -> Found:
        raw = os.fsencode(entry.path)
        uri = entry.path if printable(entry.path) == entry.path else f"file://{quote_from_bytes(raw)}"
        key = printable(os.fsdecode(_raw(folder))) + printable(entry.name)
        try:
            status = entry.stat()
        except FileNotFoundError:  # a dangling link is a row, which will fail
            return Found(key, uri, None, None, None)
        return Found(key, uri, status.st_size, None, status.st_mtime_ns // 1000)


def _text(name: str) -> str:
    """A name that is not UTF-8 as text that can be written down and turned back."""
    return quote_from_bytes(os.fsencode(name), safe="") if printable(name) != name or "%" in name else name


def _raw(folder: str) -> bytes:
    """The bytes of a folder's name."""
    return b"/".join(unquote_to_bytes(part) if "%" in part else part.encode() for part in folder.split("/"))


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)


def make_manifest(options: ListingOptions) -> Summary:
    """List the source and write the manifest; the same call goes on with one that was broken off.

    Raises ConfigurationError where the manifest is there already or nothing is there to list.
    """
    root = _root(options)
    store, name = options.store
    if store.exists(name) and not options.state_file.exists():
        raise ConfigurationError(f"--output {options.output} exists; name another file, or remove it")
    options.state_file.parent.mkdir(parents=True, exist_ok=True)
    with closing(_State(options.state_file, root.uri, options.suffixes)) as state:
        if store.exists(name) and state.tasks():
            raise ConfigurationError(f"--output {options.output} exists; name another file, or remove it")
        _list(root, state, options.workers)
        summary = state.summary(store.uri(name))
        if summary.num_rows and not store.exists(name):
            _write(store, name, state.rows())
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.unlink(f"{options.state_file}{suffix}")
    if not summary.num_rows:
        raise ConfigurationError(
            f"--input {options.source}: no images there, but {summary.num_ignored} other files; "
            "--suffixes says which are listed"
        )
    return summary


def _root(options: ListingOptions) -> Root:
    if s3.is_s3(options.source):
        s3.split(options.source)
        return Bucket(options.source.rstrip("/") + "/", options.storage)
    path = os.path.abspath(local_path(options.source))
    if not os.path.isdir(path):
        raise ConfigurationError(f"--input {options.source}: no such folder")
    return Folder(path)


def _list(root: Root, state: _State, workers: int) -> None:
    waiting = deque(state.tasks())
    running: dict[Future[Step], Task] = {}
    logged_s = time.monotonic()
    with ThreadPoolExecutor(workers, thread_name_prefix="list") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.popleft()
                    running[pool.submit(root.step, task)] = task
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                steps = [(running.pop(each), _result(each, root)) for each in done]
                for task, step in steps:
                    num_idle = workers - len(waiting) - len(running)
                    waiting.extend(state.commit(task, step, _next(root, task, step, num_idle, workers)))
                if time.monotonic() - logged_s > LOG_EVERY_S:
                    log.info("%d files so far, %d folders or parts to go", state.num_rows, len(waiting))
                    logged_s = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)


def _result(step: Future[Step], root: Root) -> Step:
    try:
        return step.result()
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigurationError(f"--input {root.uri}: {error}") from error


def _next(root: Root, task: Task, step: Step, num_idle: int, workers: int) -> list[Task]:
    """What is left to do after a step."""
    folders = [folder for folder in step.folders if not _is_hidden(folder)]
    most = TASKS_PER_WORKER * workers
    enough = len(folders) - num_idle >= most
    if enough and folders and root.has_trees:
        tasks = _trees(task.folder, folders, most)
    else:
        tasks = [Task(folder, depth=len(folder)) for folder in folders]
    if step.after is None:
        return tasks
    task = replace(task, after=step.after, num_pages=task.num_pages + 1)
    if not task.is_tree and (enough or task.num_pages >= PAGES_BEFORE_TREE):
        task = replace(task, is_tree=True, depth=len(task.folder), num_pages=0)
    if task.is_tree and task.num_pages >= PAGES_BEFORE_SPLIT and num_idle > 0:
        return [*task.split(), *tasks]
    return [task, *tasks]


def _trees(above: str, folders: Sequence[str], most: int) -> list[Task]:
    """Neighbouring folders together, in few tasks; files that lie between them are seen once more."""
    size = -(-len(folders) // most)
    groups = [folders[first : first + size] for first in range(0, len(folders), size)]
    return [
        Task(above, group[0], group[0], group[-1] + LAST_CHARACTER, is_tree=True, depth=len(above))
        for group in groups
    ]


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _write(store: Store, name: str, rows: Iterable[Sequence[object]]) -> None:
    with store.writer(name) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as parquet:
        for group in _groups(rows):
            columns = zip(*group, strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
            parquet.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))


def _groups(rows: Iterable[Sequence[object]]) -> Iterator[list[Sequence[object]]]:
    group: list[Sequence[object]] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


class _State:
    """What was listed and what is to do, in a file; one process has it at a time."""

    TABLES = """
        CREATE TABLE IF NOT EXISTS listing (root TEXT, suffixes TEXT);
        CREATE TABLE IF NOT EXISTS ignored (key TEXT PRIMARY KEY) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS tasks (
            folder TEXT, start TEXT, after TEXT, until TEXT, is_tree INTEGER, depth INTEGER,
            num_pages INTEGER, is_done INTEGER DEFAULT 0, PRIMARY KEY (folder, start)
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS files (
            key TEXT PRIMARY KEY, uri TEXT, size INTEGER, etag TEXT, modified INTEGER
        ) WITHOUT ROWID;
    """

    def __init__(self, file: Path, root: str, suffixes: frozenset[str]) -> None:
        self._suffixes = suffixes
        self._database = sqlite3.connect(file, timeout=0, isolation_level=None)
        try:
            self._open(file, root)
        except BaseException:
            self._database.close()
            raise
        self.num_rows = self._one("SELECT COUNT(*) FROM files")

    def _open(self, file: Path, root: str) -> None:
        try:
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(self.TABLES)
            self._database.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise ConfigurationError(
                f"{file} cannot be had ({error}); another listing may be at work on it, wait for its end"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{file} is not the state of a listing; remove it") from error
        wanted = (root, " ".join(sorted(self._suffixes)))
        found = self._database.execute("SELECT root, suffixes FROM listing").fetchone()
        if found is None:
            self._database.execute("INSERT INTO listing VALUES (?, ?)", wanted)
            self._put(Task(""))
        elif found != wanted:
            raise ConfigurationError(
                f"{file} belongs to a listing of {found[0]} for {found[1]}; finish that, or remove the file"
            )
        self._database.execute("COMMIT")

    def close(self) -> None:
        self._database.close()

    def tasks(self) -> list[Task]:
        """All that is to do."""
        names = "folder, start, after, until, is_tree, depth, num_pages"
        rows = self._database.execute(f"SELECT {names} FROM tasks WHERE NOT is_done")
        return [
            Task(folder, start, after, until, bool(is_tree), depth, num_pages)
            for folder, start, after, until, is_tree, depth, num_pages in rows
        ]

    def commit(self, task: Task, step: Step, left: Sequence[Task]) -> Sequence[Task]:
        """Note what a step found and what is left after it, as one; gives back the latter."""
        rows, ignored = [], []
        for each in step.files:
            if _is_hidden(each.key):
                continue
            if os.path.splitext(each.key)[1].lower() in self._suffixes:
                rows.append((each.key, each.uri, each.size, each.etag, each.modified_us))
            else:
                ignored.append((each.key,))
        self._database.execute("BEGIN")
        before = self._database.total_changes
        self._database.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?)", rows)
        self.num_rows += self._database.total_changes - before
        self._database.executemany("INSERT OR IGNORE INTO ignored VALUES (?)", ignored)
        self._database.execute(
            "UPDATE tasks SET is_done = 1 WHERE folder = ? AND start = ?", [task.folder, task.start]
        )
        for task in left:
            self._put(task)
        self._database.execute("COMMIT")
        return left

    def _put(self, task: Task) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
            [task.folder, task.start, task.after, task.until, task.is_tree, task.depth, task.num_pages],
        )

    def rows(self) -> Iterator[tuple[object, ...]]:
        """The manifest, in the order of its keys."""
        for row in self._database.execute("SELECT key, uri, size, etag, modified FROM files ORDER BY key"):
            key, uri, size, etag, modified = row
            yield key, uri, size, etag, None if modified is None else _moment(modified)

    def summary(self, manifest: str) -> Summary:
        num_bytes = self._one("SELECT COALESCE(SUM(size), 0) FROM files")
        return Summary(manifest, self.num_rows, num_bytes, self._one("SELECT COUNT(*) FROM ignored"))

    def _one(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])


def _moment(microseconds: int) -> datetime:
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
