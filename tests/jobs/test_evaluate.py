"""The evaluation's job: from flags to the page, killed in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.evaluate import FLAGS, main
from pipeline.evaluation.options import Options

JOB = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"
PATIENCE_S = 240


def test_every_option_is_a_flag() -> None:
    assert set(FLAGS) == {field.name for field in fields(Options)}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--pictures", "0"], "--pictures must be at least 1"),
        (["--budgets", "1.5"], "--budgets and --ablation-budget"),
        (["--model", "no-such-model"], "is no folder"),
        (["--policies", "unheard-of", "--pictures", "1", "--sections", "table"], "there is no policy"),
        (["--tasks", "none.parquet=anls"], "cannot be read"),
        (["--sections", "fastv"], "add table"),
        (["--fastv-layers", "4", "--pictures", "1"], "of which 1 to 3 can see all tokens"),
        (["--fastv-layers", "0"], "at least one layer"),
        (["--beside", "none.json"], "is no record of jobs/evaluate.py"),
    ],
)
def test_wrong_options_name_the_mend(
    wrong: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*wrong, f"--work={tmp_path / 'work'}", f"--output={tmp_path / 'results'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_fidelity_is_the_other_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fidelity", f"--input={tmp_path / 'absent'}", f"--output={tmp_path / 'out'}"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_drawn_tasks_are_written_as_files(tmp_path: Path) -> None:
    assert main([f"--write-tasks={tmp_path}", "--pictures=7"]) == 0
    assert {path.stem for path in tmp_path.iterdir()} >= {"pages", "signs", "captions", "presence"}
    assert pq.read_metadata(tmp_path / "captions.parquet").num_rows == 6


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_evaluation_goes_on_and_its_page_is_of_all_answers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, output = tmp_path / "work", tmp_path / "results"
    arguments = [
        f"--model={checkpoint}", "--profile=small", "--pictures=4", "--questions=1", "--chunk=1",
        "--draws=100",
        "--sections", "table", "fastv", "attention", "--attention-pictures=2", "--device=cpu", "--actors=1",
        "--fastv-layers=1", "--fastv-pictures=2",
        f"--work={work}", f"--output={output}",
    ]  # fmt: skip
    killed = kill_after_the_first_chunk(arguments, work)
    assert len(killed) < 4
    assert not output.exists()

    assert main(arguments) == 0
    chunks = files(work)
    assert len(chunks) == 4
    assert {name: chunks[name] for name in killed} == killed  # not a byte was written again
    record = json.loads((output / "record.json").read_text(encoding="utf-8"))
    rows = pq.read_table(output / "answers.parquet")
    assert record["pictures"] == len(set(rows["picture"].to_pylist())) == 4
    assert rows.num_rows == record["items"] * len(record["arms"])
    assert (
        len(set(zip(*(rows[name].to_pylist() for name in ("key", "arm", "rate")), strict=True)))
        == rows.num_rows
    )
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "| hired |" in text
    assert "| fastv K=1 | 20 % |" in text
    assert record["fastv"]["pictures"] == 2
    fastv = pq.read_table(output / "fastv-answers.parquet")
    assert set(fastv["picture"].to_pylist()) < set(rows["picture"].to_pylist())
    for picture in output.glob("*.png"):
        assert f"]({picture.name})" in text

    # More pictures go on from fewer; another budget does not.
    assert main([*arguments, "--pictures=5"]) == 0
    assert len(files(work)) == 5
    assert main([*arguments, "--alpha=0.25"]) == 2
    assert "differs in arms" in capsys.readouterr().err
    # The page alone, from the record.
    (output / "README.md").unlink()
    assert main([f"--output={output}", "--page-only"]) == 0
    assert "5 pictures" in (output / "README.md").read_text(encoding="utf-8")


def kill_after_the_first_chunk(arguments: list[str], work: Path) -> dict[str, tuple[int, int]]:
    """The chunks that a run had committed when it was killed."""
    environment = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": str(JOB.parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(JOB), *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    end_s = time.monotonic() + PATIENCE_S
    while not files(work):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end_s, "the run has committed nothing"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return files(work)


def files(work: Path) -> dict[str, tuple[int, int]]:
    """Committed chunks with the number of their inode and the time of their last change."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(work.glob("table/test/chunk-*.parquet"))
    }
