from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import fidelity
from tests.pictures import picture, saved
from tests.tiny import tiny_llava_next


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), seed=1)


def test_a_folder_becomes_a_page_and_figures_and_bad_files_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").write_bytes(saved(picture(90 + 30 * number, 60, noise=60), "PNG"))
    (images / "cut-off.jpg").write_bytes(saved(picture(), "JPEG")[:300])
    arguments = ["--input", str(images), "--output", str(tmp_path / "out"), "--model", str(model)]
    assert fidelity.main([*arguments, "--budgets", "0.3", "10", "--max-new-tokens", "6"]) == 0
    page = (tmp_path / "out" / "fidelity.md").read_text()
    assert page in capsys.readouterr().out
    assert "4 images" in page
    assert "- cut-off.jpg: " in page
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert [len(budget["images"]) for budget in record["budgets"]] == [4, 4]
    assert [each["name"] for each in record["refused"]] == ["cut-off.jpg"]


def test_images_are_taken_evenly_from_first_to_last(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").touch()
    assert [item.key for item in fidelity.evenly(str(tmp_path), 3)] == ["0.png", "4.png", "8.png"]
    assert len(fidelity.evenly(str(tmp_path), 100)) == 9


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--budgets", "1"], "--budgets 1"),
        (["--tolerance", "5"], "--tolerance 5"),
        (["--policy", "hird"], "hird"),
        (["--images", "0"], "--images 0"),
        ([], "no images there"),
    ],
)
def test_wrong_options_are_configuration_errors(
    tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), *flags]) == 2
    assert complaint in capsys.readouterr().err
