from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import restoring
from tests.pictures import picture
from tests.tiny import tiny_llava_next


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), seed=1)


def image(width: int) -> dict[str, object]:
    buffer = io.BytesIO()
    picture(width, 60).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_questions_of_a_parquet_file_become_a_page(model: Path, tmp_path: Path) -> None:
    rows = [
        {"image": image(90 + 10 * i), "question": "What?", "answers": answer, "task": f"task {i % 2}"}
        for i, answer in enumerate([["a fox", "fox"], ["dog"], None])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tasks.parquet")
    arguments = ["--model", str(model), "--input", str(tmp_path / "tasks.parquet"), "--budgets", "0.3"]
    assert restoring.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "restoring.md").read_text()
    assert "| 30 % | all | 3 |" in page
    assert "| 30 % | task 1 | 1 |" in page
    assert (tmp_path / "out" / "restoring.png").stat().st_size > 5000


def test_painted_scenes_are_asked_about_without_an_input(tmp_path: Path) -> None:
    arguments = ["--questions", "2", "--budgets", "0.05", "--block", "6", "--output", str(tmp_path)]
    assert restoring.main(arguments) == 0
    assert "| 5 % | all | 2 |" in (tmp_path / "restoring.md").read_text()


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"image": [b""]}, "lacks the columns question"),
        ({"image": [b"no picture"], "question": ["What?"]}, "image of row 0"),
        ({"image": [], "question": []}, "holds no question"),
    ],
)
def test_a_file_without_questions_is_a_configuration_error(
    model: Path,
    tmp_path: Path,
    columns: dict[str, list[object]],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "tasks.parquet")
    arguments = ["--model", str(model), "--input", str(tmp_path / "tasks.parquet")]
    assert restoring.main([*arguments, "--output", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err
