"""What the kinds of input have in common: a function from a file to the tables of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa

from hired.errors import ConfigurationError
from pipeline.columns import Failure
from pipeline.rows import Item
from pipeline.s3 import StorageOptions
from pipeline.sources.files import File

# Names of columns that hold where an image lies. The first are clear; a file that is an input by its own
# name, and was not found in a folder, may use the others as well.
URI_NAMES = ("uri", "url", "image_uri", "image_url")
LIKELY_URI_NAMES = ("image", "image_path", "path", "file_name", "filename", "file")


class NoRowsError(Exception):
    """The file is none to caption; the message says why. Raised before its first table."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The names of columns that the caller gave, and those to carry along."""

    image_column: str | None = None
    uri_column: str | None = None
    key_column: str | None = None
    columns: tuple[str, ...] = ()

    def carrying(self, columns: tuple[str, ...]) -> Wanted:
        return replace(self, columns=columns)


class Kind(Protocol):
    """A kind of input."""

    def __call__(self, file: File, wanted: Wanted, storage: StorageOptions) -> Iterator[pa.Table]:
        """The rows, by ``rows.SCHEMA`` and then those of ``wanted.columns`` that the file has.

        Damage of the file becomes a failed row; a store that is out of reach raises OSError.
        """


def uri_column(names: Sequence[str], wanted: Wanted, file: File) -> str | None:
    """The column of URIs among those of text; raises ConfigurationError if it was named and is not there."""
    if wanted.uri_column is not None:
        if wanted.uri_column not in names:
            raise missing("--uri-column", wanted.uri_column, file, names)
        return wanted.uri_column
    known = URI_NAMES + (LIKELY_URI_NAMES if file.is_named else ())
    return next((name for name in known if name in names), None)


def key_column(names: Sequence[str], wanted: Wanted, file: File) -> str | None:
    """The column of keys; raises ConfigurationError if it was named and is not there."""
    if wanted.key_column is not None and wanted.key_column not in names:
        raise missing("--key-column", wanted.key_column, file, names)
    return wanted.key_column or ("key" if "key" in names else None)


def missing(option: str, name: str, file: File, names: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(f"{option} {name}: {file.shown} has none; it has {', '.join(names) or 'none'}")


def unreadable(file: File, message: str) -> Item:
    """The failed row that stands for a file, or for what is left of it."""
    failure = Failure("read", "UnreadableFileError", message, False)
    return Item(file.name, file.shown, file.location, failure=failure)
