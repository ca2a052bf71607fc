"""API keys: kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hired.errors import ConfigurationError

VARIABLE = "HIRED_API_KEY"
MIN_CHARS = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """The digests of all keys; without any, everybody is let in."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> Keys:
        """Raises ConfigurationError for keys that are short, or that no header can carry."""
        unique = dict.fromkeys(key.strip() for key in keys if key.strip())
        for number, key in enumerate(unique, 1):
            if len(key) < MIN_CHARS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigurationError(
                    f"API key number {number} must be {MIN_CHARS} or more printable ASCII characters without "
                    "blanks; `openssl rand -hex 24` makes a good one"
                )
        return cls(tuple(_digest(key.encode()) for key in unique))

    @classmethod
    def read(cls, environment: Mapping[str, str], file: Path | None = None) -> Keys:
        """Those of the environment, commas between them, and those of the file, one a line."""
        keys = environment.get(VARIABLE, "").split(",")
        if file is not None:
            try:
                lines = file.expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"the file of API keys, {file}, cannot be read ({error})") from error
            keys += [line for line in lines if not line.lstrip().startswith("#")]
            if not any(key.strip() for key in keys):
                raise ConfigurationError(f"the file of API keys, {file}, holds none")
        return cls.of(keys)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def holder(self, authorization: bytes) -> str | None:
        """A name for whoever sent this header, without the key; None if the key is none of these."""
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # All are compared, whichever it is.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return digest.hex()[:8] if any(matches) and scheme.lower() == b"bearer" else None


WITHOUT_KEYS = Keys()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
