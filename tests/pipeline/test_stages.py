"""The stages, called as plain classes: as many rows out as in, and failures stay with their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hired
from hired.errors import ConfigurationError, GenerationError, ModelError
from hired.types import VisualTokens
from pipeline import columns
from pipeline.columns import Batch, Failure
from pipeline.config import Config
from pipeline.costs import peak_rss_bytes
from pipeline.questions import to_json
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage, attempt
from tests.pictures import picture, png_bomb, saved
from tests.pipeline.inputs import config

PROMPT = "What does the sign say?"


@pytest.fixture
def images() -> Batch:
    """Good ones of different grids, broken ones, and one that an earlier stage gave up."""
    rows: list[bytes | Failure] = [
        saved(picture(90, 60), "PNG"),
        b"no image",
        saved(picture(300, 40), "JPEG"),
        Failure("read", "FileNotFoundError", "gone", False),
        png_bomb(60_000, 60_000),
        saved(picture(40, 300), "WEBP"),
    ]
    return labelled(rows)


def labelled(rows: list[bytes | Failure], options: Config | None = None) -> Batch:
    """The rows as they leave the reading stage, with the questions of these options."""
    names = np.array([f"{number}.jpg" for number in range(len(rows))], dtype=object)
    questions = to_json((options or config(prompt=PROMPT, max_new_tokens=12)).questionnaire().of({}))
    return {
        "index": np.arange(len(rows)),
        "key": names,
        "path": names,
        "questions": np.array([questions] * len(rows), dtype=object),
        "is_sample": np.arange(len(rows)) == 0,
    } | columns.of_images(rows)


def failed(batch: Batch) -> list[str]:
    return [
        f"{failure.stage}: {failure.error_type}" if failure else "" for failure in columns.failures(batch)
    ]


FAILED = [
    "",
    "partition: UnreadableImageError",
    "",
    "read: FileNotFoundError",
    "partition: ImageTooLargeError",
    "",
]


def test_three_stages_give_the_captions_of_the_public_face(checkpoint: Path, images: Batch) -> None:
    options = config(
        model=str(checkpoint), prompt=PROMPT, max_new_tokens=12, token_budget=0.5, dtype="float32"
    )
    batch = images
    for stage in (PartitionStage(options), EncodeStage(options), GenerateStage(options)):
        batch = stage(batch)
        assert {len(column) for column in batch.values()} == {6}
        assert failed(batch) == FAILED
        assert batch["key"].tolist() == images["key"].tolist()

    vlm = hired.load(checkpoint, dtype="float32")
    good = [0, 2, 5]
    tokens = vlm.encode([vlm.partition(images["image"][row]) for row in good], budget=hired.Budget(rate=0.5))
    for row, caption in zip(good, vlm.generate(tokens, PROMPT, max_new_tokens=12), strict=True):
        assert batch["caption"][row] == caption.text
        assert batch["prompt_tokens"][row] == caption.prompt_tokens
        assert batch["visual_tokens_kept"][row] == caption.visual_tokens_kept < caption.visual_tokens_full
    assert [(batch["height"][row], batch["width"][row]) for row in good] == [(60, 90), (40, 300), (300, 40)]


def test_pixels_travel_as_bytes_and_no_further_than_the_encoder(checkpoint: Path, images: Batch) -> None:
    options = config(model=str(checkpoint))
    partitions = PartitionStage(options)(images)
    assert "image" not in partitions
    assert {pixels.dtype for pixels in partitions["pixels"]} == {np.dtype(np.uint8)}
    tokens = EncodeStage(options)(partitions)
    assert "pixels" not in tokens
    assert {features.dtype for features in tokens["features"]} == {np.dtype(np.float16)}
    assert "features" not in GenerateStage(options)(tokens)


def test_features_travel_as_float32_when_the_run_asks_for_it(checkpoint: Path, images: Batch) -> None:
    options = config(model=str(checkpoint), dtype="float32")
    tokens = EncodeStage(options)(PartitionStage(options)(images))
    assert {features.dtype for features in tokens["features"]} == {np.dtype(np.float32)}


def test_stages_take_batches_that_must_not_be_written_to(checkpoint: Path, images: Batch) -> None:
    options = config(model=str(checkpoint), max_new_tokens=2)
    batch = images
    for stage in (PartitionStage(options), EncodeStage(options), GenerateStage(options)):
        for column in batch.values():
            column.flags.writeable = False
            for value in column if column.dtype == object else ():
                if isinstance(value, np.ndarray):
                    value.flags.writeable = False
        batch = stage(batch)
    assert failed(batch) == FAILED


def test_each_stage_says_what_it_took(checkpoint: Path, images: Batch) -> None:
    options = config(model=str(checkpoint), max_new_tokens=2)
    batch = GenerateStage(options)(EncodeStage(options)(PartitionStage(options)(images)))
    for stage in ("partition", "encode", "generate"):
        assert (batch[f"{stage}_s"] > 0).all()
        assert (batch[f"{stage}_peak_rss_bytes"] > 50 * 2**20).all()
    assert batch["generate_peak_rss_bytes"].max() <= peak_rss_bytes()


def test_every_question_about_an_image_gets_an_answer_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- {id: short, prompt: 'What?', max_new_tokens: 2}\n- {id: long, prompt: Tell all.}\n")
    options = config(model=str(checkpoint), prompts=prompts, max_new_tokens=5, dtype="float32")
    batch = labelled([saved(picture(90, 60), "PNG"), b"no image", saved(picture(60, 90), "PNG")], options)
    tokens = EncodeStage(options)(PartitionStage(options)(batch))
    answers = GenerateStage(options)(tokens)
    assert answers["index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert answers["question"].tolist() == [0, 1] * 3
    assert answers["prompt"].tolist() == ["What?", "Tell all."] * 3
    assert [bool(kept) for kept in answers["kept"]] == [True, True, False, False, False, False]
    assert failed(answers) == ["", "", *["partition: UnreadableImageError"] * 2, "", ""]
    assert answers["completion_tokens"][0] <= 2
    assert np.isnan(answers["encode_s"]).tolist() == [False, True] * 3, "each image is encoded once"
    assert not np.isnan(answers["generate_s"]).any()
    vlm = hired.load(checkpoint, dtype="float32")
    alone = vlm.generate(
        [vlm.encode([vlm.partition(batch["image"][2])], budget=options.budget)[0]],
        "Tell all.",
        max_new_tokens=5,
    )
    assert answers["caption"][5] == alone[0].text


def test_a_worker_takes_the_threads_it_is_given(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        PartitionStage(config(model=str(checkpoint), partition={"threads": 3}))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stage", [PartitionStage, EncodeStage, GenerateStage])
def test_a_wrong_checkpoint_stops_a_stage_at_once(stage: Callable[[Any], object], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        stage(config(model=str(tmp_path)))


def test_an_unknown_policy_stops_the_encoder(checkpoint: Path, images: Batch) -> None:
    options = config(model=str(checkpoint), policy="no-such-policy")
    with pytest.raises(ConfigurationError, match="no-such-policy"):
        EncodeStage(options)(PartitionStage(options)(images))


def test_a_row_that_breaks_its_batch_fails_alone() -> None:
    calls: list[list[int]] = []

    def work(values: Sequence[int]) -> list[int]:
        calls.append(list(values))
        if 13 in values:
            raise ZeroDivisionError("unlucky")
        return [10 * value for value in values]

    gone = Failure("read", "OSError", "", True)
    assert attempt("encode", [1, gone, 13, 3], work) == [
        10,
        gone,
        Failure("encode", "ZeroDivisionError", "unlucky", False),
        30,
    ]
    assert calls == [[1, 13, 3], [1], [13], [3]]


def test_a_batch_too_large_for_memory_is_worked_on_row_by_row() -> None:
    def work(values: Sequence[int]) -> Sequence[int]:
        if len(values) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values

    assert attempt("generate", [1, 2, 3], work) == [1, 2, 3]


def test_errors_that_work_returns_belong_to_their_rows() -> None:
    def work(values: Sequence[int]) -> list[int | Exception]:
        return [GenerationError("no") if value == 2 else value for value in values]

    assert attempt("generate", [1, 2], work) == [1, Failure("generate", "GenerationError", "no", False)]


def test_nothing_is_worked_on_when_all_rows_have_failed() -> None:
    gone = Failure("read", "OSError", "", True)

    def work(values: Sequence[VisualTokens]) -> list[VisualTokens]:
        raise AssertionError("called")

    assert attempt("generate", [gone, gone], work) == [gone, gone]


@pytest.mark.parametrize(
    "error", [ConfigurationError("wrong"), ModelError("wrong"), torch.AcceleratorError("dead")]
)
def test_errors_that_are_no_rows_fault_are_raised(error: Exception) -> None:
    def work(values: Sequence[int]) -> list[int]:
        raise error

    with pytest.raises(type(error)):
        attempt("encode", [1, 2], work)


def test_a_stage_that_loses_rows_fails_them_instead() -> None:
    (row,) = attempt("encode", [1], lambda values: [])
    assert isinstance(row, Failure)
    assert "0 results for 1 rows" in row.error
