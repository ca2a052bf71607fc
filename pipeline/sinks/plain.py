"""Values of a table as JSON holds them: whatever columns an input brought along, a line can be written."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """The value in one line: bytes in base64, times in ISO 8601, NaN and infinities as null."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def plain(value: Any) -> Any:
    """The value in what JSON has."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case Mapping():
            return {str(name): plain(each) for name, each in value.items()}
        case Sequence():
            return [plain(each) for each in value]
        case _:
            return str(value)  # decimals, durations, UUIDs
