"""The presets are the shapes that they say, and folders that load like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LlavaNextForConditionalGeneration

import hired
from hired.embedded.tokenisation import build_tokenizer
from hired.families.checkpoint import num_parameters
from hired.geometry import Tiling, num_tokens
from hired.types import Size
from pipeline.benchmark.models import checkpoint, configuration
from pipeline.benchmark.pictures import LONG_SIDE
from pipeline.benchmark.roofline import shapes
from pipeline.benchmark.subject import Subject


@pytest.mark.parametrize("model", ["small", "7b"])
def test_a_square_image_has_2880_visual_tokens(model: str) -> None:
    config = configuration(model, build_tokenizer())
    tower = config.vision_config
    tiling = Tiling(
        tower.image_size, tower.patch_size, tuple(Size(*size) for size in config.image_grid_pinpoints)
    )
    original = Size(LONG_SIDE, LONG_SIDE)
    assert num_tokens(original, tiling.grid(original), tiling.patches_per_side) == 2880


def test_the_small_model_is_as_small_as_it_says_and_as_balanced() -> None:
    tower, language = shapes(configuration("small", build_tokenizer()))
    assert 300e6 < language.weights < 350e6
    assert 0.05 < tower.flops(5) / language.prefill_flops(2944) < 0.08


def test_the_7b_has_the_parameters_of_llava_next_7b() -> None:
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(configuration("7b", build_tokenizer()))
    assert model.num_parameters() == pytest.approx(7.06e9, rel=1e-3)


def test_a_preset_is_made_once_and_loads(subject: Subject, models: Path) -> None:
    folder = models / "toy"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert checkpoint("toy", models, torch.device("cpu")) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [file.name for file in models.iterdir()] == ["toy"]

    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert num_parameters(folder) == sum(tensor.numel() for tensor in weights.values())
    vlm = hired.load(folder, device="cpu")
    tokens = vlm.encode(subject.partitions[:1], budget=hired.Budget(rate=0.5))
    [caption] = vlm.generate(tokens, "?", max_new_tokens=40)
    assert caption.completion_tokens == 40
    assert GenerationConfig.from_pretrained(folder).eos_token_id is None


def test_the_same_seed_draws_the_same_weights(subject: Subject, tmp_path: Path) -> None:
    again = checkpoint("toy", tmp_path, torch.device("cpu"))
    one, other = (load_file(folder / "model.safetensors") for folder in (subject.path, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_other_names_are_folders_or_the_embedded_model(subject: Subject, tmp_path: Path) -> None:
    assert checkpoint(str(subject.path), tmp_path, torch.device("cpu")) == subject.path
    with pytest.raises(hired.ConfigurationError, match="is no folder"):
        checkpoint("tiny", tmp_path, torch.device("cpu"))
