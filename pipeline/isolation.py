"""Image bytes -> ``Partitions`` in a process of its own, where a decoder may hang, crash or eat memory.

The child is a fresh interpreter (no fork of a process with threads, nothing inherited but one socket), which
decodes one image after the other and is replaced when it dies or is too slow. A hang is final at the first
time: the child was ready when it got the image, so the time was the image's own. A death is not: what kills
by chance, such as the machine running out of memory, rarely does so twice. An image of 640 x 480 pixels takes
a millisecond or two longer than in the worker itself; shared memory would save one of them.

Not multiprocessing's or pebble's pools: their workers share pipes and locks, which a worker that is killed in
the middle of a message leaves unusable for its successors. Here both ends of the socket die with the child.
What comes back is numbers, names and pixels, never a pickle.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from hired.errors import ConfigurationError, HiredError, ImageError, ImageTooLargeError, UnreadableImageError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Box, Grid, Partitions, Size

# Importing what decodes takes a second or a few, more on a busy machine or from a network's file system.
START_TIMEOUT_S = 300.0
MAX_STARTS = 3
MAX_DEATHS = 2

# An orphan ends by itself this much after its parent would have ended it.
ALARM_AFTER_S = 3.0

# Of those that the kernel may kill for want of memory, the first choice: cheaper to replace than a model.
OOM_SCORE = "900"

Work: TypeAlias = Callable[..., Partitions]

_SERVE = "import sys; from pipeline.isolation import serve; serve(int(sys.argv[1]))"
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ImageError, UnreadableImageError, ImageTooLargeError)
}


class ImageTimeoutError(ImageError):
    """Decoding the image took longer than an image may."""

    retryable = True  # the machine may have been busy


class WorkerDiedError(HiredError):
    """The process that worked on the row died, and did so again when the row was tried once more."""

    retryable = True  # another machine may have the memory, another version of a library not the fault


@dataclass(frozen=True, slots=True)
class _Setup:
    """What a child needs to know once."""

    work: Work  # found by its name in the child
    tiling: Tiling
    max_pixels: int
    reduced: bool
    timeout_s: float
    max_memory_bytes: int | None


class IsolatedPartitioner:
    """Partitions images in one child process, which it replaces when it has to.

    ``max_memory_bytes`` is what decoding may take beyond what the child needs anyway: an image that asks for
    more fails like one that is too large. Without it the machine's memory is the limit.
    One image at a time: threads that share one wait for each other.
    """

    def __init__(
        self,
        tiling: Tiling,
        *,
        max_pixels: int,
        reduced: bool,
        timeout_s: float,
        max_memory_bytes: int | None = None,
        work: Work = partition,
    ) -> None:
        self._setup = _Setup(work, tiling, max_pixels, reduced, timeout_s, max_memory_bytes)
        self._one_at_a_time = threading.Lock()
        self.peak_rss_bytes = 0  # of the largest child so far
        self._child: _Child | None = _Child(self._setup)  # gets ready while the caller does other things

    def __call__(self, images: Sequence[bytes]) -> list[Partitions | Exception]:
        """The partitions of each image, or why there are none, in order.

        Raises ConfigurationError when no child can be started at all.
        """
        with self._one_at_a_time:
            return [self._partitioned(image) for image in images]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> IsolatedPartitioner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _partitioned(self, image: bytes) -> Partitions | Exception:
        how = ""
        for _ in range(MAX_DEATHS):
            child = self._ready()
            try:
                partitions, peak_rss_bytes = child.partitioned(image, self._setup.timeout_s)
            except TimeoutError:
                self.close()
                return ImageTimeoutError(f"decoding was ended after {self._setup.timeout_s:g} s")
            except (EOFError, OSError):
                how = child.end()
                self._child = None
            else:
                self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)
                return partitions
        return WorkerDiedError(f"decoding ended its process {MAX_DEATHS} times ({how})")

    def _ready(self) -> _Child:
        """A child that waits for an image."""
        how = ""
        for _ in range(MAX_STARTS):
            self._child = self._child or _Child(self._setup)
            if self._child.is_ready():
                return self._child
            how = self._child.end()
            self._child = None
        raise ConfigurationError(
            f"the process that decodes images ended {MAX_STARTS} times before it was ready ({how}); its log "
            "says why, and if there is nothing, give it more memory"
        )


class _Child:
    """The parent's end of one child."""

    def __init__(self, setup: _Setup) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self._connection = ours
        self._is_ready = False
        self._connection.send_bytes(pickle.dumps(setup))

    def is_ready(self) -> bool:
        """Whether it waits for an image, once it has had the time to start."""
        if self._process.poll() is not None:
            return False
        if not self._is_ready:
            with suppress(EOFError, OSError):
                self._is_ready = self._connection.poll(START_TIMEOUT_S) and bool(
                    self._connection.recv_bytes()
                )
        return self._is_ready

    def partitioned(self, image: bytes, timeout_s: float) -> tuple[Partitions | Exception, int]:
        """The image's partitions or its own error, and the child's peak resident memory so far.

        Raises TimeoutError when there is no answer in time, EOFError or OSError when the child died.
        """
        self._connection.send_bytes(image)
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        answer = json.loads(self._connection.recv_bytes())
        if "error" in answer:
            return _error(answer["error"], answer["message"]), answer["peak_rss_bytes"]
        pixels = np.frombuffer(self._connection.recv_bytes(), np.uint8).reshape(answer["shape"])
        partitions = Partitions(
            pixels, Grid(*answer["grid"]), Box(*answer["content"]), Size(*answer["original_size"])
        )
        return partitions, answer["peak_rss_bytes"]

    def end(self) -> str:
        """How it ended: by itself, or else by now."""
        self._connection.close()
        try:
            status = self._process.wait(1.0)  # at the end of its input it goes
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"exit code {status}" if status >= 0 else _signal_name(-status)


def serve(handle: int) -> None:
    """The child: partitions of one image after the other, until the parent's end is closed."""
    connection = Connection(handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(EOFError, OSError):
        setup: _Setup = pickle.loads(connection.recv_bytes())
        Image.init()  # imports the readers of all formats, which should not count as the first image's time
        _bound(setup.max_memory_bytes)
        connection.send_bytes(b"ready")
        while True:
            image = connection.recv_bytes()
            # The default action of the alarm ends the process even inside of a decoder.
            signal.setitimer(signal.ITIMER_REAL, setup.timeout_s + ALARM_AFTER_S)
            answer, pixels = _answer(setup, image)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(json.dumps(answer).encode())
            if pixels is not None:
                connection.send_bytes(pixels)


def _answer(setup: _Setup, image: bytes) -> tuple[dict[str, Any], memoryview | None]:
    """What the parent gets to know of an image, and its pixels."""
    try:
        partitions = setup.work(image, setup.tiling, max_pixels=setup.max_pixels, reduced=setup.reduced)
    except MemoryError:
        message = "the image asks for more memory than there is"
        return _peak() | {"error": ImageTooLargeError.__name__, "message": message}, None
    except HiredError as error:
        return _peak() | {"error": type(error).__name__, "message": str(error)}, None
    except Exception as error:
        traceback.print_exc()
        return _peak() | {"error": type(error).__name__, "message": ""}, None
    answer = {
        "shape": partitions.pixels.shape,
        "grid": astuple(partitions.grid),
        "content": astuple(partitions.content),
        "original_size": astuple(partitions.original_size),
    }
    return _peak() | answer, np.ascontiguousarray(partitions.pixels).reshape(-1).data


def _error(name: str, message: str) -> Exception:
    """The child's error in the parent."""
    if name == ConfigurationError.__name__:
        raise ConfigurationError(message)
    if name in _ERRORS:
        return _ERRORS[name](message)
    return RuntimeError(f"decoding raised {name}; the worker's log has the details")


def _bound(max_memory_bytes: int | None) -> None:
    """Set this process's own limits, whatever the parent's are: on memory, and on the dumps of crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (hard, hard))
    if max_memory_bytes is not None:
        # Of data and not of addresses: libraries reserve many more of these than they ever fill.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = _data_bytes() + max_memory_bytes
        if hard == resource.RLIM_INFINITY or soft < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def _data_bytes() -> int:
    """What counts against the limit on data by now; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
