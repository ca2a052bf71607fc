"""WebDataset tars: a sample is the members of one name up to its first dot, and its image one of them.

Headers are walked, images are skipped; of a tar in S3 only ranges are read. The keys of one tar are in memory
while it is listed. Texts are carried along with images that lie beside them, as WebDataset writes them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa

from hired.errors import UnreadableImageError
from pipeline import s3
from pipeline.columns import Failure, printable
from pipeline.rows import Item, to_table
from pipeline.s3 import StorageOptions
from pipeline.sources.files import IMAGE_SUFFIXES, File
from pipeline.sources.jsonl import column
from pipeline.sources.kinds import Wanted, unreadable
from pipeline.sources.tables import BYTES_PER_TABLE, ROWS_PER_TABLE

MEMBERS = ("json", "txt")
# A range of a tar in S3: many headers of small images, and little to throw away before a large one.
RANGE_BYTES = 512 * 2**10
MAX_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar; ``text`` of those that are carried along."""

    name: str
    offset: int
    size: int
    text: str | None = None

    @property
    def key(self) -> str:
        return sample_key(self.name)

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()


@dataclass(slots=True)
class _Rows:
    """Rows on their way into a table, with the texts of their samples."""

    file: File
    columns: tuple[str, ...]
    items: list[Item] = field(default_factory=list)
    texts: list[dict[str, str]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, item: Item, texts: dict[str, str]) -> None:
        self.items.append(item)
        self.texts.append(texts)
        self.num_bytes += sum(map(len, texts.values()))

    def flush(self) -> Iterator[pa.Table]:
        if self.items:
            yield self._table()
        self.items, self.texts, self.num_bytes = [], [], 0

    @property
    def is_full(self) -> bool:
        return len(self.items) >= ROWS_PER_TABLE or self.num_bytes >= BYTES_PER_TABLE

    def _table(self) -> pa.Table:
        table = to_table(self.items)
        objects = [_object(each) for each in self.texts] if {*self.columns} - {*MEMBERS} else []
        for name in self.columns:
            if name in MEMBERS:
                table = table.append_column(
                    name, pa.array([each.get(name) for each in self.texts], pa.string())
                )
            elif any(name in each for each in objects):
                values = column([each.get(name) for each in objects], name, self.file)
                table = table.append_column(name, values)
        return table


def tables(file: File, wanted: Wanted, storage: StorageOptions) -> Iterator[pa.Table]:
    """A row a sample. What is after a broken header cannot be listed; one row stands for it."""
    rows = _Rows(file, wanted.columns)
    without_image: dict[str, str] = {}
    with_image: set[str] = set()
    members = _Readable(file, bool(wanted.columns), storage)
    for key, group in groupby(members, key=attrgetter("key")):
        sample = list(group)
        texts = {each.suffix[1:]: each.text for each in sample if each.text is not None}
        images = [each for each in sample if each.suffix in IMAGE_SUFFIXES]
        for each in images:
            path = f"{file.name}/{each.name}"
            rows.add(Item(key, path, file.location, each.offset, each.size), texts)
            with_image.add(key)
        if not images:
            without_image.setdefault(key, f"{file.name}/{sample[0].name}")
        if rows.is_full:
            yield from rows.flush()
    if members.damage is not None:
        kind = type(members.damage).__name__
        rows.add(unreadable(file, f"not a readable tar from some point on ({kind})"), {})
    for key, path in without_image.items():
        if key not in with_image:
            failure = Failure.of(UnreadableImageError("the sample has no image"), "read")
            rows.add(Item(key, path, file.location, failure=failure), {})
            if rows.is_full:
                yield from rows.flush()
    yield from rows.flush()


class _Readable:
    """The members of a tar up to its damage, if it has any."""

    def __init__(self, file: File, with_texts: bool, storage: StorageOptions) -> None:
        self._members = _members(file, with_texts, storage)
        self.damage: Exception | None = None

    def __iter__(self) -> Iterator[_Member]:
        try:
            yield from self._members
        except (tarfile.TarError, OSError, ValueError) as error:
            if s3.is_outage(error):
                raise
            self.damage = error


def _members(file: File, with_texts: bool, storage: StorageOptions) -> Iterator[_Member]:
    with closing(_opened(file, storage)) as data, tarfile.open(fileobj=data, mode="r:") as tar:
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # tarfile remembers all of them otherwise
            name = printable(member.name)
            if not member.isreg() or not sample_key(name):
                continue
            text = None
            if with_texts and name.lower().endswith((".json", ".txt")) and member.size <= MAX_TEXT_BYTES:
                text = _text_at(data, member.offset_data, member.size)
            yield _Member(name, member.offset_data, member.size, text)
        _check_end(data, tar.offset)


def _opened(file: File, storage: StorageOptions) -> IO[bytes]:
    if s3.is_s3(file.location):
        return io.BufferedReader(cast(Any, s3.ObjectReader(file.location, storage)), RANGE_BYTES)
    return open(file.location, "rb")


def _text_at(data: IO[bytes], offset: int, size: int) -> str:
    data.seek(offset)
    return data.read(size).decode("utf-8", "backslashreplace")


def _check_end(data: IO[bytes], offset: int) -> None:
    """Raise ReadError where something else than the end follows: tarfile takes damage for the end."""
    data.seek(offset)
    if data.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a broken header")


def _object(texts: dict[str, str]) -> dict[str, Any]:
    """The sample's JSON object, empty if it has none: its fields are null then, and its text stays."""
    try:
        parsed = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def sample_key(member: str) -> str:
    """The key of a member of a WebDataset tar: its path up to the first dot of its last part."""
    path = PurePosixPath(member)
    stem = path.name.split(".")[0]
    return str(path.with_name(stem)) if stem else ""
