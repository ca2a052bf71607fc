"""The files of an input in one order, local or in S3; hidden ones are left out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hired.errors import ConfigurationError
from pipeline import s3
from pipeline.columns import printable
from pipeline.s3 import StorageOptions

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True, slots=True)
class File:
    """A file's location, a path or a URI; its name below the input; whether the input names it itself."""

    location: str
    name: str
    is_named: bool = False

    @property
    def suffix(self) -> str:
        """In lower case; that of a compressed file has two parts."""
        stem, last = os.path.splitext(self.location.lower())
        return os.path.splitext(stem)[1] + last if last == ".gz" else last

    @property
    def shown(self) -> str:
        """The location as people and Arrow can read it."""
        return printable(self.location)

    @property
    def folder(self) -> str:
        """Where relative paths in the file start."""
        return os.path.dirname(self.location) or "."


def find(source: str, storage: StorageOptions) -> Iterator[File]:
    """Every file of a folder, a glob or a name; raises ConfigurationError if there can be none."""
    if not s3.is_s3(source):
        return _local(source.removeprefix("file://"))
    return _remote(source, storage)


def _local(source: str) -> Iterator[File]:
    if os.path.isdir(source):
        yield from (_file(path, source) for path in _walk(source))
    elif _is_file(source):
        yield _file(source, os.path.dirname(source) or ".", is_named=True)
    elif glob.has_magic(source):
        yield from _globbed(source)
    else:
        raise ConfigurationError(f"--input {source}: no such file or folder")


def _file(path: str, root: str, *, is_named: bool = False) -> File:
    return File(path, printable(os.path.relpath(path, root).replace(os.sep, "/")), is_named)


def _globbed(source: str) -> Iterator[File]:
    parts = Path(source).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = str(Path(*parts[:fixed]))
    found = glob.glob(source, recursive=True)
    named = set(filter(_is_file, found))
    inside = {file for path in found if os.path.isdir(path) for file in _walk(path)}
    for path in sorted(named | inside):
        yield _file(path, root, is_named=path in named)


def _walk(folder: str) -> Iterator[str]:
    """The files below, as if all paths were sorted, with the names of one folder in memory."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigurationError(
            f"the folder {printable(folder)} cannot be listed ({error.strerror}); see to its permissions"
        ) from error
    names = [(entry.name + "/", True) for entry in visible if entry.is_dir(follow_symlinks=False)]
    names += [(entry.name, False) for entry in visible if is_file(entry)]
    del visible
    for name, is_folder in sorted(names):
        path = os.path.join(folder, name.removesuffix("/"))
        if is_folder:
            yield from _walk(path)
        else:
            yield path


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether this is a row to account for, as dangling links are; pipes and sockets block their readers."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def _is_file(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _remote(source: str, storage: StorageOptions) -> Iterator[File]:
    try:
        _, key = s3.split(source)
        if key and not key.endswith("/") and _is_object(source, storage):
            yield File(source, key.rpartition("/")[2], is_named=True)
            return
        folder = source.rstrip("/") + "/"
        if s3.list_page(folder, storage, max_keys=1).objects:
            yield from _below(folder, folder, [], storage)
        elif glob.has_magic(key):
            yield from _matching(source, storage)
        else:
            raise ConfigurationError(f"--input {source}: no object or folder there")
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigurationError(f"--input {source}: {error}") from error


def _is_object(uri: str, storage: StorageOptions) -> bool:
    try:
        return s3.exists(uri, storage)
    except PermissionError:  # also said of missing objects to those who may not list
        return False


def _matching(source: str, storage: StorageOptions) -> Iterator[File]:
    bucket, key = s3.split(source)
    parts = key.split("/")
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folder = "/".join((s3.SCHEME + bucket, *parts[:fixed], ""))
    start = next(index for index, character in enumerate(parts[fixed]) if character in "*?[")
    yield from _below(folder, folder + parts[fixed][:start], parts[fixed:], storage)


def _below(folder: str, start: str, patterns: Sequence[str], storage: StorageOptions) -> Iterator[File]:
    """The objects whose URIs begin with ``start`` and whose names below the folder match."""
    bucket, prefix = s3.split(folder)
    for found in s3.list_objects(start, storage):
        name = found.key[len(prefix) :]
        parts = name.split("/")
        if any(part.startswith(".") for part in parts) or not parts[-1]:
            continue
        rest = unmatched(parts, patterns)
        if rest is not None:
            yield File(f"{s3.SCHEME}{bucket}/{found.key}", name, is_named=bool(patterns) and rest == 0)


def unmatched(parts: Sequence[str], patterns: Sequence[str]) -> int | None:
    """How many parts lie below what the patterns match, 0 if they match all; None if they match nothing."""
    if not patterns:
        return len(parts)
    if patterns[0] == "**":
        rests = (unmatched(parts[start:], patterns[1:]) for start in range(len(parts)))
        return min((rest for rest in rests if rest is not None), default=None)
    if not parts or not fnmatchcase(parts[0], patterns[0]):
        return None
    return unmatched(parts[1:], patterns[1:])
