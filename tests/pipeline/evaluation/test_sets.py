"""Sets of tasks: drawn ones written to parquet, and files that anybody brings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hired.errors import ConfigurationError
from hired.evaluation.items import Picture
from hired.evaluation.tasks import draw
from pipeline.evaluation import sets
from pipeline.evaluation.options import TUNING, Options


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    return list(draw(7, seed=1))


def file_of(folder: Path, **columns: list[Any]) -> Path:
    path = folder / "own.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def asking(*tasks: str, **options: Any) -> list[Picture]:
    return sets.pictures(Options(tasks=tasks, **options))


def test_written_tasks_read_back_as_they_were_drawn(drawn: list[Picture], tmp_path: Path) -> None:
    files = sets.write(tmp_path, drawn)
    read = asking(*map(str, files))
    assert {item for picture in read for item in _by_bytes(picture, drawn).items} == {
        item for picture in drawn for item in picture.items
    }
    found = {(item.key, item.question, item.answers, item.metric) for p in read for item in p.items}
    assert found == {(i.key, i.question, i.answers, i.metric) for p in drawn for i in p.items}


def _by_bytes(picture: Picture, drawn: list[Picture]) -> Picture:
    [same] = [other for other in drawn if other.data == picture.data]
    assert {item.key for item in picture.items} == {item.key for item in same.items}
    return same


def test_hugging_faces_datasets_show_the_pictures(drawn: list[Picture], tmp_path: Path) -> None:
    files = {path.stem: str(path) for path in sets.write(tmp_path / "tasks", drawn)}
    [row] = datasets.load_dataset(
        "parquet", data_files={"test": files["captions"]}, split="test[:1]", cache_dir=str(tmp_path)
    )
    first = next(picture for picture in drawn if any(item.task == "captions" for item in picture.items))
    assert row["image"].size == Image.open(io.BytesIO(first.data)).size
    assert row["question"] == "Describe the image."


def test_a_file_needs_little(drawn: list[Picture], tmp_path: Path) -> None:
    data = drawn[0].data
    path = file_of(
        tmp_path, image=[data, data, drawn[1].data], question=["a", "b", "c"], answers=["1", "2", "3"]
    )
    first, second = asking(f"{path}=anls", max_new_tokens=9)
    assert [item.question for item in first.items] == ["a", "b"]
    [item] = second.items
    assert (item.task, item.metric, item.answers, item.max_new_tokens) == ("own", "anls", ("3",), 9)
    assert asking(f"{path}=anls", pictures=1, max_new_tokens=9) == [first]


@pytest.mark.parametrize(
    ("columns", "task", "words"),
    [
        ({"image": [b"x"], "question": ["a"]}, "{}=anls", "no column answers"),
        ({"image": [b"x"], "question": ["a"], "answers": ["b"]}, "{}", "says no metric"),
        ({"image": [b"x"], "question": ["a"], "answers": ["b"]}, "{}=bleu", "no metric 'bleu'"),
        ({"image": [b""], "question": ["a"], "answers": ["b"]}, "{}=anls", "row 0 holds no bytes"),
        ({"image": [b"x"], "question": ["a"], "answers": [[]]}, "{}=anls", "row 0 has no answer"),
        (
            {"key": ["k", "k"], "image": [b"x", b"y"], "question": ["a", "b"], "answers": ["b", "c"]},
            "{}=anls",
            "two items have the key 'k'",
        ),
    ],
)
def test_a_file_that_does_not_say_enough_is_an_error_that_names_it(
    tmp_path: Path, columns: dict[str, list[Any]], task: str, words: str
) -> None:
    path = file_of(tmp_path, **columns)
    with pytest.raises(ConfigurationError, match=words):
        asking(task.format(path))


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        asking(f"{tmp_path}/none.parquet=anls")


def test_tuning_pictures_are_never_test_pictures() -> None:
    test = sets.pictures(Options(pictures=3, seed=4))
    tuning = sets.pictures(Options(pictures=3, seed=4, tuning=True))
    assert not {p.data for p in test} & {p.data for p in tuning}
    with pytest.raises(ConfigurationError, match="--seed"):
        Options(seed=TUNING)
