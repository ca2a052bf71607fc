"""Work for a decoding process that does what the image's first bytes say; imported by that process too."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import numpy as np

from hired.errors import ImageError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Partitions


def obey(image: bytes, tiling: Tiling, **options: Any) -> Partitions:
    """The partitions of the image, unless it asks for something worse."""
    order, _, rest = image.partition(b":")
    match order:
        case b"hang":
            time.sleep(3600)
        case b"hang without python":
            pattern = (b"a" * 64 + b"b") * 3
            sum(1 for _ in range(10**12) if pattern)
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"crash once":
            _crash_unless_there(rest.decode())
        case b"exit":
            os._exit(7)
        case b"eat":
            np.ones(int(rest), np.uint8)
        case b"bug":
            raise ZeroDivisionError("secret at 0x7f00")
        case b"limits":
            kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CORE)
            raise ImageError(str([resource.getrlimit(kind)[0] for kind in kinds]))
        case b"pid":
            raise ImageError(str(os.getpid()))
    return partition(image, tiling, **options)


def _crash_unless_there(marker: str) -> None:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
