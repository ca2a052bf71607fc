"""The benchmark's job: from flags to the two files."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from jobs.benchmark import FLAGS, main
from pipeline.benchmark.subject import Options

TOY = shlex.split(
    "--model toy --images 2 --max-new-tokens 2 --batch-size 1 --repeats 1 --device cpu --threads 1"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [f"--cache={tmp_path_factory.mktemp('models')}", f"--output={tmp_path_factory.mktemp('results')}"]


def written(folders: list[str], suffix: str) -> str:
    return (Path(folders[1].partition("=")[2]) / f"benchmark-toy.{suffix}").read_text(encoding="utf-8")


def test_every_option_is_a_flag() -> None:
    assert set(FLAGS) == {field.name for field in fields(Options)}


def test_the_record_names_everything_needed_to_run_it_again(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TOY, *folders, "--sections", "encoder"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.rstrip() == written(folders, "md").rstrip()

    record = json.loads(written(folders, "json"))
    assert record["command"] == shlex.join(["python", "jobs/benchmark.py", *arguments])
    for name in ("hardware", "commit", "dtype", "threads", "options", "ceilings"):
        assert record[name]
    assert {"python", "torch", "transformers", "ray"} == set(record["versions"])
    assert list(record["sections"]) == ["encoder"]
    assert record["sections"]["encoder"]["measured_at"]

    more = [*TOY, *folders, "--sections", "latency", "--arms", "keep-all", "hired-20", "--add"]
    assert main(more) == 0
    record = json.loads(written(folders, "json"))
    assert list(record["sections"]) == ["encoder", "latency"]
    commands = [section["command"] for section in record["sections"].values()]
    assert commands == [shlex.join(["python", "jobs/benchmark.py", *line]) for line in (arguments, more)]

    assert main([*more, "--dtype", "float32"]) == 2
    assert "the record there has dtype bfloat16" in capsys.readouterr().err


def test_wrong_options_name_the_mend(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, words in (
        (["--images", "0"], "--images must be at least 1"),
        (["--max-new-tokens", "1"], "--max-new-tokens must be at least 2"),
        (["--input", str(tmp_path)], "no readable images"),
        (["--model", "no-such-model"], "is no folder"),
    ):
        assert main([*TOY, *folders, *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_job_under_ray_is_held_against_the_bare_loop(folders: list[str]) -> None:
    arguments = [*TOY, *folders, "--images", "33", "--batch-size", "8", "--sections", "ray"]
    assert main([*arguments, "--ray-options", "generate.threads=1", "policy=hired-reference"]) == 0
    figures = json.loads(written(folders, "json"))["sections"]["ray"]["figures"]
    assert figures["images"] == 33
    assert figures["ray_images_per_s"]["median"] > figures["ray_images_per_s_with_start_up"]["median"] > 0
    assert figures["bare_images_per_s"]["median"] > 0
    assert 0 < figures["start_up_share"] < 1
    assert figures["ray_against_bare"] == pytest.approx(
        figures["ray_images_per_s"]["median"] / figures["bare_images_per_s"]["median"], rel=1e-3
    )
    assert {"partition_busy_s", "encode_busy_s", "generate_busy_s"} <= set(figures["stages"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_plan_is_held_against_the_run_that_follows(folders: list[str]) -> None:
    arguments = [*TOY, *folders, "--images", "24", "--batch-size", "8", "--sections", "plan"]
    assert main([*arguments, "--ray-options", "plan_seconds=1"]) == 0
    lines = {
        each["what"]: each
        for each in json.loads(written(folders, "json"))["sections"]["plan"]["figures"]["comparisons"]
    }
    assert lines["rows"] == {"what": "rows", "planned": 24, "actual": 24, "error": 0}
    time = lines["time, s"]
    assert time["error"] == pytest.approx(time["actual"] / time["planned"] - 1, abs=1e-2)
    assert lines["visual tokens an image, after"]["error"] == pytest.approx(0, abs=0.05)
    assert "| visual tokens an image, after | " in written(folders, "md")
