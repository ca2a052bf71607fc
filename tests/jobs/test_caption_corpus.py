"""The whole job: every row of an input ends in exactly one table, and the exit code says how it went."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import caption_corpus as job
from pipeline.config import Config, from_tree
from pipeline.graph import Stages
from pipeline.run import caption_corpus
from pipeline.sinks import CAPTIONS, DEAD_LETTERS
from pipeline.stages import PartitionStage
from tests.pictures import picture, png_bomb, saved, turned
from tests.pipeline.hostile_decoders import obey
from tests.pipeline.inputs import IMAGE_STRUCT, write_parquet, write_tar

Rows = dict[str, dict[str, Any]]
GIB = 2**30


class ObedientPartitionStage(PartitionStage):
    """Decodes in a process that hangs or dies when a file says so."""

    work = staticmethod(obey)


def run(source: Path | str, output: Path, *options: object) -> int:
    return job.main([f"--input={source}", f"--output={output}", *map(str, options)])


def tables(output: Path) -> tuple[Rows, Rows]:
    """Captions and dead letters by key."""
    captions, dead_letters = (
        {row["key"]: row for row in pq.read_table(output / name).to_pylist()}
        for name in ("captions", "dead_letters")
    )
    assert not captions.keys() & dead_letters.keys()
    return captions, dead_letters


def manifest(output: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return read


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images as files, in a parquet file and in a tar, good ones and broken ones."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "notes.txt").write_text("not an image")
    (folder / "a.png").write_bytes(saved(picture(90, 60), "PNG"))
    (folder / "deep" / "turned.jpg").write_bytes(turned(picture(90, 60), 6))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "gone.jpg").symlink_to("nowhere")
    rows = [
        {"key": "p-good", "image": {"bytes": saved(picture(50, 50), "WEBP"), "path": "x.webp"}},
        {"key": "p-none", "image": None},
    ]
    write_parquet(folder / "some.parquet", rows, key=pa.string(), image=IMAGE_STRUCT)
    members = {
        "t-good.jpg": saved(picture(20, 200), "JPEG"),
        "t-good.txt": b"!",
        "t-bomb.png": png_bomb(60_000, 60_000),
    }
    write_tar(folder / "00000.tar", members)
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_rows_of_every_format_end_in_exactly_one_table(
    mixed: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ["--model", checkpoint, "--max-new-tokens", 5, "--token-budget", 0.4, "--prompt", "What is it?"]
    assert run(mixed, output, *options) == 0

    printed = capsys.readouterr().out
    assert "8 rows: 4 captions, 4 dead letters" in printed
    assert f"{output}/captions" in printed
    assert len(printed.splitlines()) < 15, "stdout holds the summary alone"

    captions, dead_letters = tables(output)
    assert {key: (row["height"], row["width"]) for key, row in captions.items()} == {
        "a.png": (60, 90),
        "deep/turned.jpg": (60, 90),
        "p-good": (50, 50),
        "t-good": (200, 20),
    }
    assert {key: (row["stage"], row["error_type"]) for key, row in dead_letters.items()} == {
        "broken.jpg": ("partition", "UnreadableImageError"),
        "gone.jpg": ("read", "FileNotFoundError"),
        "p-none": ("read", "UnreadableImageError"),
        "t-bomb": ("partition", "ImageTooLargeError"),
    }
    assert pq.read_table(output / "captions").schema.equals(CAPTIONS)
    assert pq.read_table(output / "dead_letters").schema.equals(DEAD_LETTERS)

    record = manifest(output)
    for row in captions.values():
        assert (row["model"], row["policy"], row["prompt"]) == (str(checkpoint), "hired", "What is it?")
        assert row["run_id"] == record["run_id"]
        assert 1 <= row["completion_tokens"] <= 5
        assert row["visual_tokens_kept"] < row["visual_tokens_full"]
        assert row["visual_tokens_kept"] < row["prompt_tokens"]
        assert row["finish_reason"] in ("stop", "length")
    assert record["counts"]["rows"] == 8
    assert record["tokens"]["visual_kept"] == sum(row["visual_tokens_kept"] for row in captions.values())
    assert record["configuration"]["token_budget"] == 0.4
    assert record["configuration"]["encode"]["num_cpus"] == 0.5, "the manifest tells what was settled"
    assert len(record["model"]["sha256"]) == 64
    assert record["versions"]["ray"]
    assert list(record["stages"]) == ["read", "partition", "encode", "generate"]
    assert all(stage["rows"] == 8 and stage["busy_s"] > 0 for stage in record["stages"].values())

    files = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    assert run(mixed, output, *options) == 0, "the same command finds nothing left to do"
    unchanged = {file for file, written_ns in files.items() if file.stat().st_mtime_ns == written_ns}
    assert files.keys() - unchanged <= {output / "_work" / "lock"}
    capsys.readouterr()
    assert run(mixed, output, *options, "--prompt", "Why?") == 2, "another run must not touch it"
    assert "--prompt was 'What is it?' and is 'Why?'" in capsys.readouterr().err
    assert tables(output) == (captions, dead_letters)


@pytest.mark.ray
@pytest.mark.slow
def test_the_file_runs_by_itself_from_any_folder(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(saved(picture(), "PNG"))
    command = [sys.executable, job.__file__, "--input=in", "--output=out", f"--model={checkpoint}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.startswith("1 rows: 1 captions, 0 dead letters")
    assert len(ran.stdout.splitlines()) < 10, "stdout holds the summary alone"
    assert tables(tmp_path / "out")[0].keys() == {"a.png"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_hostile_files_neither_stop_the_job_nor_take_its_memory(
    corpus: Path, tmp_path: Path, checkpoint: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for name in ("once", "twice"):
        shutil.copytree(corpus / "hostile", source / name)
    (source / "hang.jpg").write_bytes(b"hang:")
    (source / "crash.jpg").write_bytes(b"crash:")
    options = {"model": str(checkpoint), "max_new_tokens": 2, "image_timeout_s": 20}
    caption_corpus(
        from_tree({"input": str(source), "output": str(output), **options}),
        stages=Stages(partition=ObedientPartitionStage),
    )
    captions, dead_letters = tables(output)
    keys = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert captions.keys() | dead_letters.keys() == keys
    assert dead_letters.pop("hang.jpg")["error_type"] == "ImageTimeoutError"
    assert dead_letters.pop("crash.jpg")["error_type"] == "WorkerDiedError"
    for key in captions.keys() | dead_letters.keys():
        other = key.replace("once/", "twice/")
        assert captions.get(key, {}).get("caption") == captions.get(other, {}).get("caption"), key
    captions = {key.removeprefix("once/"): row for key, row in captions.items()}
    dead_letters = {key.removeprefix("once/"): row for key, row in dead_letters.items()}
    for bomb in ("giant-image.jpg", "65536-uint32-limit.png"):
        assert dead_letters[bomb]["error_type"] == "ImageTooLargeError"
    for broken in ("empty.jpg", "not-an-image.png", "truncated.jpg", "truncated.png", "corrupt-header.jpg"):
        assert dead_letters[broken]["error_type"] == "UnreadableImageError"
    assert not any(row["retryable"] for row in dead_letters.values())
    turned_files = [file.name for file in (corpus / "hostile").glob("exif-*_*.jpg")]
    assert len(turned_files) > 10
    for name in turned_files:
        upright = captions[name]
        assert (upright["width"] > upright["height"]) == ("Landscape" in name), name
    peaks = {stage: cost["peak_rss_bytes"] for stage, cost in manifest(output)["stages"].items()}
    assert all(50 * 2**20 < peak < 2 * GIB for peak in peaks.values()), peaks


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_photos_and_documents_run_to_the_end(corpus: Path, tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    assert run(f"{corpus}/[dp]*/*", output, "--model", checkpoint, "--max-new-tokens", 2) == 0
    captions, dead_letters = tables(output)
    images = [file for name in ("documents", "photos") for file in (corpus / name).iterdir()]
    keys = {f"{file.parent.name}/{file.name}" for file in images if file.suffix in (".jpg", ".png")}
    assert (captions.keys(), dead_letters) == (keys, {})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_several_questions_kept_columns_and_every_format(tmp_path: Path, checkpoint: Path) -> None:
    rows = [
        {"key": f"k{number}", "image": {"bytes": saved(picture(40, 30 + number), "PNG"), "path": "x.png"}}
        | {"what": f"thing {number}", "score": number / 2}
        for number in range(5)
    ] + [{"key": "bad", "image": {"bytes": b"no", "path": None}, "what": "x", "score": 0.0}]
    source = write_parquet(
        tmp_path / "in.parquet",
        rows,
        key=pa.string(),
        image=IMAGE_STRUCT,
        what=pa.string(),
        score=pa.float64(),
    )
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("short: Name the {what}.\nlong: Tell all.\n")
    output = tmp_path / "out"
    formats = ["--formats", "webdataset,jsonl,coco,txt", "--keep-images", "--keep-columns", "score"]
    options = ["--model", checkpoint, "--max-new-tokens", 2, "--prompts", prompts, "--rows-per-file", 4]
    assert run(source, output, *formats, *options) == 0
    captions = pq.read_table(output / "captions")
    found = {(row["key"], row["prompt_id"]): row for row in captions.to_pylist()}
    assert found.keys() == {(f"k{number}", name) for number in range(5) for name in ("short", "long")}
    assert found["k3", "short"]["prompt"] == "Name the thing 3."
    assert found["k3", "long"]["score"] == 1.5
    assert found["k2", "short"]["image"]["bytes"] == rows[2]["image"]["bytes"]  # type: ignore[index]
    assert pq.read_table(output / "dead_letters")["prompt_id"].to_pylist() == ["short", "long"]
    for name in ("webdataset/00001.tar", "jsonl/part-000001.jsonl", "captions.coco.json", "txt/k4.txt"):
        assert (output / name).stat().st_size > 0
    assert "<img" in (output / "report.html").read_text()
    assert manifest(output)["stages"]["encode"]["rows"] == 6, "each image is encoded once"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_dead_letters_that_may_succeed_are_tried_again_on_demand(tmp_path: Path, checkpoint: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.png").write_bytes(saved(picture(40, 30 + number), "PNG"))
    (source / "5.png").write_bytes(b"no picture")
    (source / "slow.png").write_bytes(b"crash once:" + str(tmp_path / "gone").encode())
    tree = {"input": str(source), "output": str(output), "model": str(checkpoint), "max_new_tokens": 2}
    stages = Stages(partition=ObedientPartitionStage)
    (source / "4.png").write_bytes(b"crash:")
    first = caption_corpus(from_tree(tree), stages=stages)
    assert (first.counts.captions, first.counts.dead_letters, first.counts.retryable) == (4, 3, 1)
    (source / "4.png").write_bytes(saved(picture(40, 34), "PNG"))
    again = caption_corpus(from_tree(tree | {"retry_failed": True}), stages=stages)
    assert (again.counts.captions, again.counts.dead_letters, again.counts.retryable) == (5, 2, 0)
    captions, dead_letters = tables(output)
    assert dead_letters.keys() == {"5.png", "slow.png"}
    assert captions["4.png"]["caption"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_told_to_end_goes_on_later(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(240):
        (tmp_path / "in" / f"{number:03d}.png").write_bytes(saved(picture(40 + number % 7, 50), "PNG"))
    command = [sys.executable, job.__file__, "--input=in", "--output=out", f"--model={checkpoint}"]
    command += ["--rows-per-unit=6", "--rows-per-file=60", "--max-new-tokens=8", "--generate.batch-size=4"]
    environment = os.environ | {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    units = tmp_path / "out" / "_work" / "units"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        while running.poll() is None and not (units.is_dir() and any(units.iterdir())):
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert "the same command goes on" in running.communicate(timeout=200)[1]
    assert running.returncode == os.EX_TEMPFAIL
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert any(units.iterdir())
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert len(tables(tmp_path / "out")[0]) == 240
    sessions = manifest(tmp_path / "out")["sessions"]
    assert len(sessions) == 2
    assert sum(session["rows"] for session in sessions) == 240
    assert 0 < sessions[0]["rows"] < 240


def test_a_row_that_was_lost_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(config: Config, command: str) -> None:
        raise RuntimeError(f"rows of {config.input} were lost")

    monkeypatch.setattr(job, "caption_corpus", crash)
    assert run("in", tmp_path / "out") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input", "absent"], "no such file or folder"),
        (["--token-bugdet", "0.2"], "did you mean --token-budget?"),
        (["--token-budget", "1"], "write 1.0 to keep all"),
        (["--policy", "keep-some"], "keep-all"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--output", "holds-captions"], "name another folder"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_configuration_error_is_one_message_with_its_mend(
    options: list[str],
    said: str,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "holds-captions" / "captions").mkdir(parents=True)
    (tmp_path / "holds-captions" / "captions" / "mine.parquet").write_bytes(b"")
    before = sorted(os.walk(tmp_path))
    given = ["--input", "in", "--output", "out", "--model", str(checkpoint)]
    assert job.main([*given, *options]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("configuration error: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert sorted(os.walk(tmp_path)) == before, "nothing was written"
