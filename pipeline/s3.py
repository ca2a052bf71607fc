"""Objects of S3 and of stores that speak its language, read and written with retries.

Every request is tried ``StorageOptions.attempts`` times with exponential backoff and jitter, by boto3's
standard mode; so are bodies that break off, which boto3 leaves to its callers. Errors leave this module as
OSError and its kinds, and name the object: FileNotFoundError, PermissionError, FileExistsError for a
condition that did not hold.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import islice
from typing import IO, Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError

from hired.errors import ConfigurationError

SCHEME = "s3://"
MAX_CONNECTIONS = 64
MAX_KEYS_PER_DELETE = 1000
# A part of an upload in memory, and what S3 takes at least but for the last one is 5 MiB.
UPLOAD = TransferConfig(multipart_threshold=16 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=4)
_BROKEN_BODY = (
    *(HTTPError, ConnectionError, TimeoutError),
    *(IncompleteReadError, ReadTimeoutError, ResponseStreamingError),
)
_MISSING = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}
_FORBIDDEN = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
}
_CONDITION = {"PreconditionFailed", "412", "ConditionalRequestConflict"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How storage is reached: the endpoint of stores other than Amazon's, credentials, tries a request."""

    s3_endpoint: str | None = None
    s3_region: str | None = None
    s3_anonymous: bool = False
    attempts: int = 5

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(f"{self.attempts} attempts at input and output; give 1 or more")
        if self.s3_endpoint and "://" not in self.s3_endpoint:
            raise ConfigurationError(f"--s3-endpoint {self.s3_endpoint}: begin it with http:// or https://")

    @property
    def endpoint(self) -> str | None:
        """As given, or where the variables of the AWS tools point."""
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return self.s3_endpoint or next(filter(None, map(os.environ.get, variables)), None)


@dataclass(frozen=True, slots=True)
class Listed:
    """One object as a listing shows it."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing: objects, folders that were not entered, and where to go on, if anywhere."""

    objects: list[Listed]
    folders: list[str]
    token: str | None


@dataclass(frozen=True, slots=True)
class Versioned:
    """The bytes of a small object, the tag of this version, and its age by the clock of the store."""

    data: bytes
    etag: str
    age_s: float


def is_s3(location: str) -> bool:
    return location.startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://bucket/key``; raises ConfigurationError without a bucket."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not is_s3(uri) or not bucket:
        raise ConfigurationError(f"{uri} names no bucket; write s3://bucket/folder")
    return bucket, key


def client(options: StorageOptions) -> Any:
    """The client of this process, safe for threads; a forked child gets its own."""
    return _client(options, options.endpoint, os.getpid())


@lru_cache(maxsize=8)
def _client(options: StorageOptions, endpoint: str | None, process: int) -> Any:
    session = boto3.session.Session()
    # Stores other than Amazon's often know neither buckets as host names nor the newer checksums.
    style = {"addressing_style": "path"} if endpoint else {}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        max_pool_connections=MAX_CONNECTIONS,
        connect_timeout=10,
        read_timeout=60,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if options.s3_anonymous else None,
        s3=style,
    )
    region = options.s3_region or session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Errors of boto3 become kinds of OSError that name the object."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _MISSING:
            raise FileNotFoundError(
                f"{uri}: {'no such bucket' if code == 'NoSuchBucket' else 'not found'}"
            ) from error
        if code in _FORBIDDEN:
            raise PermissionError(
                f"{uri}: {code}; look at the credentials and the bucket's policy"
            ) from error
        if code in _CONDITION:
            raise FileExistsError(f"{uri}: somebody else wrote it") from error
        if code in ("InvalidRange", "416"):
            raise EOFError(f"{uri} ends before the bytes that were asked for") from error
        raise OSError(f"{uri}: {code} after all attempts") from error
    except NoCredentialsError as error:
        raise PermissionError(f"{uri}: no AWS credentials; set them up, or say --s3-anonymous") from error
    except (BotoCoreError, HTTPError) as error:
        raise OSError(f"{uri}: {type(error).__name__} after all attempts") from error


def is_outage(error: BaseException) -> bool:
    """Whether a store was out of reach, rather than what it holds missing or broken."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return isinstance(error.__cause__, ClientError | BotoCoreError | HTTPError) or "AWS Error" in str(error)


def get(
    uri: str, options: StorageOptions, *, start: int = 0, size: int = -1, limit: int | None = None
) -> bytes:
    """The object, or ``size`` bytes of it from ``start`` on, fewer where it ends before.

    Raises OverflowError, with the size, for more than ``limit`` bytes, of which none are read then.
    """
    if size == 0:
        return b""
    bucket, key = split(uri)
    wanted = (
        {} if start == 0 and size < 0 else {"Range": f"bytes={start}-{start + size - 1 if size > 0 else ''}"}
    )

    def once() -> bytes:
        response = client(options).get_object(Bucket=bucket, Key=key, **wanted)
        with response["Body"] as body:
            length = int(response["ContentLength"])
            if limit is not None and length > limit:
                raise OverflowError(length)
            data: bytes = body.read()
        if len(data) < length:
            raise ConnectionError(f"{uri}: {len(data)} of {length} bytes came")
        return data

    with translated(uri):
        return _again(options)(once)


def _again(options: StorageOptions) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(_BROKEN_BODY),
        stop=stop_after_attempt(options.attempts),
        wait=wait_random_exponential(multiplier=0.2, max=20),
        reraise=True,
    )


def get_versioned(uri: str, options: StorageOptions) -> Versioned:
    """A small object with its tag and age."""
    bucket, key = split(uri)
    with translated(uri):
        response = client(options).get_object(Bucket=bucket, Key=key)
        data = response["Body"].read()
    now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Versioned(data, response["ETag"], (now - response["LastModified"]).total_seconds())


def put(uri: str, data: bytes, options: StorageOptions, **conditions: str) -> str:
    """The new tag; the object appears whole. ``IfMatch`` or ``IfNoneMatch`` not holding: FileExistsError."""
    bucket, key = split(uri)
    with translated(uri):
        response = client(options).put_object(Bucket=bucket, Key=key, Body=data, **conditions)
    return str(response["ETag"])


def upload(uri: str, file: IO[bytes], options: StorageOptions) -> None:
    """Everything from the file's start on, in parts where it is large; the object appears whole."""
    bucket, key = split(uri)
    file.seek(0)
    with translated(uri):
        client(options).upload_fileobj(_Unclosed(file), bucket, key, Config=UPLOAD)


def exists(uri: str, options: StorageOptions) -> bool:
    bucket, key = split(uri)
    try:
        with translated(uri):
            client(options).head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def list_page(
    uri: str,
    options: StorageOptions,
    *,
    delimiter: str = "",
    token: str | None = None,
    start_after: str = "",
    max_keys: int = 1000,
) -> Page:
    """The next objects whose keys begin as the URI does, in the order of their UTF-8 bytes."""
    bucket, prefix = split(uri)
    wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": max_keys}
    wanted |= {"Delimiter": delimiter} if delimiter else {}
    wanted |= {"ContinuationToken": token} if token else {"StartAfter": start_after} if start_after else {}
    with translated(uri):
        page = client(options).list_objects_v2(**wanted)
    return Page(
        [
            Listed(each["Key"], int(each["Size"]), each["ETag"].strip('"'), each["LastModified"])
            for each in page.get("Contents", ())
        ],
        [each["Prefix"] for each in page.get("CommonPrefixes", ())],
        page.get("NextContinuationToken") if page.get("IsTruncated") else None,
    )


def list_objects(uri: str, options: StorageOptions) -> Iterator[Listed]:
    """All objects whose keys begin as the URI does, in the order of their UTF-8 bytes, a page in memory."""
    token = None
    while True:
        page = list_page(uri, options, token=token)
        yield from page.objects
        if (token := page.token) is None:
            return


def delete(bucket_uri: str, keys: Iterable[str], options: StorageOptions) -> None:
    """Missing keys are fine."""
    bucket, _ = split(bucket_uri)
    waiting = iter(keys)
    while some := list(islice(waiting, MAX_KEYS_PER_DELETE)):
        _delete(bucket, some, options)


def _delete(bucket: str, keys: Sequence[str], options: StorageOptions) -> None:
    """S3 may refuse single keys of a request that succeeds; those are asked for again."""
    for attempt in range(options.attempts):
        with translated(f"{SCHEME}{bucket}"):
            response = client(options).delete_objects(
                Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        errors = response.get("Errors", ())
        if not errors:
            return
        keys = [each["Key"] for each in errors]
        time.sleep(0.1 * 2**attempt)
    raise OSError(f"{SCHEME}{bucket}/{keys[0]} cannot be deleted: {errors[0].get('Code')}")


class ObjectReader(io.RawIOBase):
    """An object as a file that is read by ranges; wrap it in a BufferedReader, each call is a request."""

    def __init__(self, uri: str, options: StorageOptions) -> None:
        bucket, key = split(uri)
        with translated(uri):
            head = client(options).head_object(Bucket=bucket, Key=key)
        self._uri, self._options, self._size, self._place = uri, options, int(head["ContentLength"]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._place)
        if size <= 0:
            return 0
        data = get(self._uri, self._options, start=self._place, size=size)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class _Unclosed:
    """A file that its reader cannot close, as boto3 does after an upload."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        """Nothing: the file's owner closes it."""
