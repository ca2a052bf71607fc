"""The job of a million rows, with some thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import scale


@pytest.mark.ray
@pytest.mark.slow
def test_every_row_is_accounted_for_and_memory_is_told(tmp_path: Path) -> None:
    # In a process of its own: stages that travel by value would do so in all later tests.
    command = [sys.executable, scale.__file__, "--rows=3000", f"--output={tmp_path}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result = json.loads((tmp_path / "scale.json").read_text())["result"]
    assert (result["rows"], result["captions"], result["dead_letters"]) == (3000, 2999, 1)
    assert result["rows_per_s"] > 0
    assert result["driver_mib_at_the_end"] > 50
    assert f"| captions | {result['captions']:,} |" in (tmp_path / "scale.md").read_text()


def test_memory_is_the_most_around_the_moment_when_so_many_rows_were_done() -> None:
    points = [(float(second), second * 10, 100 + second) for second in range(100)]
    assert scale.memory_at(points, 200) == 125
    assert scale.memory_at(points, 5000) == 199
