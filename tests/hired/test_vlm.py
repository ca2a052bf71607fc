"""The public face: the names other people rely on."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

import hired
from hired.errors import PromptError
from hired.vlm import resolve
from tests.tiny import tiny_llava_next


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> hired.VLM:
    return hired.load(checkpoint, device="cpu", dtype=torch.float32)


def picture(height: int, width: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def test_the_readmes_lines_give_captions(vlm: hired.VLM) -> None:
    data = io.BytesIO()
    picture(90, 60).save(data, "PNG")
    partitions = [vlm.partition(data.getvalue()), vlm.partition(picture(30, 120))]
    tokens = vlm.encode(partitions, budget=hired.Budget(rate=0.2), policy="hired")
    captions = vlm.generate(tokens, ["What is it?", "Describe."], max_new_tokens=8)

    for image, caption in zip(tokens, captions, strict=True):
        assert len(image) == int(0.2 * image.num_before)
        assert caption.completion_tokens == len(caption.token_ids) <= 8
        assert caption.visual_tokens_kept >= len(image)
        assert caption.visual_tokens_full > image.num_before
        assert caption.finish_reason in ("stop", "length")


def test_one_prompt_serves_all_images(vlm: hired.VLM) -> None:
    partitions = [vlm.partition(picture(90, 60)), vlm.partition(picture(30, 120))]
    tokens = vlm.encode(partitions, budget=hired.Budget(tokens=9))

    assert vlm.generate(tokens, "Describe.", max_new_tokens=4) == vlm.generate(
        tokens, ["Describe.", "Describe."], max_new_tokens=4
    )


def test_the_first_rows_error_is_raised(vlm: hired.VLM) -> None:
    tokens = vlm.encode([vlm.partition(picture(60, 60))] * 3, budget=hired.Budget(tokens=9))

    prompts, limits = ["fine", "not <image> fine", "fine"], [4, 4, 4000]
    with pytest.raises(hired.GenerationError, match="<image>"):
        vlm.generate(tokens, prompts, max_new_tokens=limits)
    answers = vlm.generator.generate(tokens, prompts, max_new_tokens=limits)
    assert [type(answer) for answer in answers] == [hired.Caption, PromptError, hired.CapacityError]


def test_path_and_config_are_the_checkpoints(vlm: hired.VLM, checkpoint: Path) -> None:
    assert vlm.path == checkpoint
    assert vlm.config.model_type == "llava_next"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float16),
        ("float32", torch.float32),
        (torch.float32, torch.float32),
        ("bfloat16", torch.float16),
    ],
)
def test_features_are_handed_over_as_float16_unless_float32_is_asked_for(
    checkpoint: Path, dtype: str | torch.dtype | None, expected: torch.dtype
) -> None:
    vlm = hired.load(checkpoint, device="cpu", dtype=dtype)
    [tokens] = vlm.encode([vlm.partition(picture(50, 50))], budget=hired.Budget(rate=0.5))
    assert tokens.features.dtype == expected


def test_the_halves_are_loaded_when_first_used(checkpoint: Path) -> None:
    vlm = hired.load(str(checkpoint), device="cpu")
    vlm.encode([vlm.partition(picture(50, 50))], budget=hired.Budget(rate=0.5))
    assert "encoder" in vars(vlm)
    assert "generator" not in vars(vlm)


def test_importing_hired_leaves_transformers_alone() -> None:
    code = "import sys, hired; print('transformers' in sys.modules)"
    project = Path(hired.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=project
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("model", ["no such folder", "./missing/folder", Path("missing/folder"), "/missing"])
def test_a_missing_folder_is_a_model_error(model: str | Path) -> None:
    with pytest.raises(hired.ModelError, match="folder"):
        resolve(model)


def test_an_embedded_model_without_its_files_is_a_model_error_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hired.embedded.CHECKPOINT", tmp_path)
    with pytest.raises(hired.ModelError, match=r"train_embedded\.py"):
        resolve("embedded")


def test_a_hub_id_that_cannot_be_had_is_a_model_error_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(hired.ModelError, match="hf download nobody/nothing"):
        resolve("nobody/nothing")


def test_a_hub_id_in_the_cache_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)

    assert resolve("somebody/something") == snapshot


def test_every_end_of_sequence_token_of_the_checkpoint_ends_an_answer(tmp_path: Path) -> None:
    checkpoint = tiny_llava_next(tmp_path)
    vlm = hired.load(checkpoint, device="cpu")
    tokens = vlm.encode([vlm.partition(picture(90, 60))], budget=hired.Budget(rate=0.5))
    [free] = vlm.generate(tokens, "Describe.", max_new_tokens=12)
    last = free.token_ids[5]
    (checkpoint / "generation_config.json").write_text(f'{{"eos_token_id": [1, {last}]}}')

    [caption] = hired.load(checkpoint, device="cpu").generate(tokens, "Describe.", max_new_tokens=12)
    assert caption.token_ids == free.token_ids[: free.token_ids.index(last)]
    assert caption.finish_reason == "stop"


@pytest.mark.parametrize(("device", "dtype"), [("toaster", None), ("cpu", "int3"), ("cpu", torch.int8)])
def test_an_impossible_device_or_dtype_is_a_configuration_error(
    checkpoint: Path, device: str, dtype: str | torch.dtype | None
) -> None:
    with pytest.raises(hired.ConfigurationError, match="use"):
        hired.load(checkpoint, device=device, dtype=dtype)
