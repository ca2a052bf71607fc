"""Decoding in a process of its own: real hangs, real crashes, real bombs, and their neighbours."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hired.errors import ConfigurationError, ImageTooLargeError, UnreadableImageError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Partitions, Size
from pipeline import isolation
from pipeline.columns import Failure
from pipeline.isolation import ImageTimeoutError, IsolatedPartitioner, WorkerDiedError
from tests.pictures import picture, png_bomb, saved
from tests.pipeline.hostile_decoders import obey

TILING = Tiling(24, 8, (Size(48, 48), Size(24, 48), Size(48, 24)))
IMAGE = saved(picture(90, 60), "PNG")
TIMEOUT_S = 4.0  # of a machine that is busy with other tests


@pytest.fixture(scope="module")
def partitioner() -> Iterator[IsolatedPartitioner]:
    """One for all tests, as every replacement costs a start."""
    with IsolatedPartitioner(
        TILING, max_pixels=10_000, reduced=False, timeout_s=TIMEOUT_S, max_memory_bytes=2**28, work=obey
    ) as one:
        yield one


def is_the_picture(result: Partitions | Exception) -> bool:
    expected = partition(IMAGE, TILING)
    return (
        isinstance(result, Partitions)
        and np.array_equal(result.pixels, expected.pixels)
        and (result.grid, result.content) == (expected.grid, expected.content)
        and result.original_size == expected.original_size
    )


def pid(partitioner: IsolatedPartitioner) -> int:
    (answer,) = partitioner([b"pid:"])
    return int(str(answer))


def test_partitions_are_those_of_this_process(partitioner: IsolatedPartitioner) -> None:
    assert is_the_picture(partitioner([IMAGE])[0])
    assert 2**24 < partitioner.peak_rss_bytes < 2**32


def test_an_image_of_no_use_comes_out_as_its_own_error(partitioner: IsolatedPartitioner) -> None:
    results = partitioner([b"no image", b"", png_bomb(60_000, 60_000), IMAGE])
    assert [type(result) for result in results] == [
        UnreadableImageError,
        UnreadableImageError,
        ImageTooLargeError,
        Partitions,
    ]
    assert str(results[1]) == "the image is empty (0 bytes)"
    assert "exceed the limit of 10000" in str(results[2])


def test_an_image_that_hangs_is_ended_at_once_for_good_and_its_neighbours_are_done(
    partitioner: IsolatedPartitioner,
) -> None:
    partitioner([IMAGE])
    started_s = time.monotonic()
    before, hangs, after = partitioner([IMAGE, b"hang:", IMAGE])
    assert is_the_picture(before)
    assert isinstance(hangs, ImageTimeoutError)
    assert str(hangs) == "decoding was ended after 4 s"
    assert Failure.of(hangs, "partition").retryable
    assert is_the_picture(after)
    assert time.monotonic() - started_s > TIMEOUT_S


def test_a_decoder_that_never_comes_back_to_python_is_ended_too(partitioner: IsolatedPartitioner) -> None:
    child = pid(partitioner)
    (hangs,) = partitioner([b"hang without python:"])
    assert isinstance(hangs, ImageTimeoutError)
    assert not is_alive(child)


def test_an_image_that_crashes_its_process_is_tried_once_more_and_given_up(
    partitioner: IsolatedPartitioner,
) -> None:
    before, crashes, after = partitioner([IMAGE, b"crash:", IMAGE])
    assert is_the_picture(before)
    assert is_the_picture(after)
    assert isinstance(crashes, WorkerDiedError)
    assert str(crashes) == "decoding ended its process 2 times (SIGSEGV)"
    assert Failure.of(crashes, "partition").retryable


def test_an_image_whose_process_was_killed_by_chance_is_done_the_second_time(
    partitioner: IsolatedPartitioner, tmp_path: Path
) -> None:
    marker = str(tmp_path / "died").encode()
    (once,) = partitioner([b"crash once:" + marker])
    assert isinstance(once, UnreadableImageError)  # the answer to what is no image
    assert (tmp_path / "died").exists()


def test_a_process_that_died_between_two_images_is_no_images_fault(
    partitioner: IsolatedPartitioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(pid(partitioner), signal.SIGKILL)
    time.sleep(0.5)
    monkeypatch.setattr(isolation, "MAX_DEATHS", 1)
    assert is_the_picture(partitioner([IMAGE])[0])


def test_a_decoder_that_asks_for_too_much_memory_gets_an_error_and_not_the_machines(
    partitioner: IsolatedPartitioner,
) -> None:
    child = pid(partitioner)
    eats, fits, image = partitioner([b"eat:%d" % 2**29, b"eat:%d" % 2**26, IMAGE])
    assert isinstance(eats, ImageTooLargeError)
    assert str(eats) == "the image asks for more memory than there is"
    assert isinstance(fits, UnreadableImageError)
    assert is_the_picture(image)
    assert pid(partitioner) == child


def test_what_a_bug_says_stays_in_the_log(
    partitioner: IsolatedPartitioner, capfd: pytest.CaptureFixture[str]
) -> None:
    (bug,) = partitioner([b"bug:"])
    assert type(bug) is RuntimeError
    assert str(bug) == "decoding raised ZeroDivisionError; the worker's log has the details"


def test_the_child_has_limits_of_its_own(partitioner: IsolatedPartitioner) -> None:
    import resource

    (answer,) = partitioner([b"limits:"])
    addresses, data, core = map(int, re.findall(r"-?\d+", str(answer)))
    assert addresses == resource.getrlimit(resource.RLIMIT_AS)[1]
    assert 2**28 < data < 2**28 + 2**32
    assert core == 0


def test_a_child_without_a_parent_ends_by_itself() -> None:
    one = IsolatedPartitioner(TILING, max_pixels=10_000, reduced=False, timeout_s=TIMEOUT_S, work=obey)
    child = pid(one)
    one.close()
    assert not is_alive(child)
    one.close()  # twice is no harm


def test_a_child_that_hangs_without_a_parent_ends_by_itself_too() -> None:
    one = IsolatedPartitioner(TILING, max_pixels=10_000, reduced=False, timeout_s=0.2, work=obey)
    child = one._ready()
    child._connection.send_bytes(b"hang without python:")
    child._connection.close()  # as the end of the parent does
    assert child._process.wait(30) == -signal.SIGALRM


def test_when_no_child_can_be_started_the_job_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_SERVE", "raise SystemExit(3)")
    with (
        IsolatedPartitioner(TILING, max_pixels=10_000, reduced=False, timeout_s=TIMEOUT_S) as one,
        pytest.raises(ConfigurationError, match=r"ended 3 times before it was ready \(exit code 3\)"),
    ):
        one([IMAGE])


def is_alive(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True
