"""Checkpoints found by model type, read half by half, refused with the mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from hired import families
from hired.errors import ModelError
from hired.families.checkpoint import load_weights
from hired.families.llava_next import LlavaNextLanguageHalf, LlavaNextVisionHalf
from hired.geometry import Tiling
from hired.types import Size
from tests.tiny import tiny_llava_next

HALVES: list[type[Any]] = [LlavaNextVisionHalf, LlavaNextLanguageHalf]
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_llava_next(tmp_path)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[key] = value
    path.write_text(json.dumps(content))


def rename_weights(checkpoint: Path, rename: Callable[[str], str | None]) -> None:
    file = checkpoint / "model.safetensors"
    renamed = {rename(name): weight for name, weight in load_file(file).items()}
    save_file({name: weight for name, weight in renamed.items() if name}, file, metadata={"format": "pt"})


def new_name(name: str) -> str:
    """The names of a checkpoint saved in today's layout."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def old_name(name: str) -> str:
    """The names of the published LLaVA-NeXT checkpoints; only the tower differs from what is saved today."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("rename", [old_name, new_name], ids=["old names", "new names"])
def test_the_halves_hold_the_weights_of_the_whole_whatever_their_names_on_disk(
    checkpoint: Path, rename: Callable[[str], str]
) -> None:
    whole = weights(LlavaNextForConditionalGeneration.from_pretrained(checkpoint))
    rename_weights(checkpoint, rename)
    vision, language = (weights(load_weights(half, checkpoint, CPU, torch.float32)) for half in HALVES)

    assert vision.keys() | language.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in {**vision, **language}.items())


def test_no_half_holds_weights_of_the_other(checkpoint: Path) -> None:
    vision, language = (weights(load_weights(half, checkpoint, CPU, torch.float32)) for half in HALVES)

    assert {name.split(".")[1] for name in vision} == {"vision_tower"}
    assert not vision.keys() & language.keys()


def test_weights_of_the_other_half_are_not_read(checkpoint: Path) -> None:
    """A float64 weight of the wrong shape would be refused or converted if it were touched."""
    file = checkpoint / "model.safetensors"
    stored = load_file(file)
    for name in stored:
        if name.startswith("language_model"):
            stored[name] = torch.full((1,), torch.nan, dtype=torch.float64)
    save_file(stored, file, metadata={"format": "pt"})

    tower = load_weights(LlavaNextVisionHalf, checkpoint, CPU, torch.float32)
    assert all(bool(weight.isfinite().all()) for weight in weights(tower).values())
    with pytest.raises(ModelError):
        load_weights(LlavaNextLanguageHalf, checkpoint, CPU, torch.float32)


def test_tied_embeddings_are_tied_in_the_language_half(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", tie_word_embeddings=True, text_config__tie_word_embeddings=True)
    rename_weights(checkpoint, lambda name: None if "lm_head" in name else name)

    half = load_weights(LlavaNextLanguageHalf, checkpoint, CPU, torch.float32)
    assert half.lm_head.weight is half.model.language_model.embed_tokens.weight


def test_weights_are_loaded_in_the_wanted_dtype_without_gradients(checkpoint: Path) -> None:
    for half in HALVES:
        parameters = list(load_weights(half, checkpoint, CPU, torch.bfloat16).parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("lost", ["vision_tower.pre_layrnorm.weight", "image_newline"])
def test_a_missing_weight_is_never_drawn_at_random(checkpoint: Path, lost: str) -> None:
    rename_weights(checkpoint, lambda name: None if name == lost else name)

    half = LlavaNextVisionHalf if lost.startswith("vision_tower") else LlavaNextLanguageHalf
    with pytest.raises(ModelError, match=lost):
        load_weights(half, checkpoint, CPU, torch.float32)


def test_a_truncated_weights_file_is_a_model_error(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(ModelError, match="again"):
        families.load_encoder(checkpoint)


def test_missing_weights_file_is_a_model_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="again"):
        families.load_generator(checkpoint)


def test_an_unknown_model_type_is_refused_with_the_supported_ones(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", model_type="mamba_vision_9")

    with pytest.raises(ModelError, match=r"mamba_vision_9.*llava_next"):
        families.tiling(checkpoint)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    with pytest.raises(ModelError, match=r"config\.json"):
        families.tiling(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "default"),
        ({"vision_feature_layer": [-2, -3]}, "several layers"),
        ({"vision_feature_layer": 0}, "hidden state"),
        ({"vision_feature_layer": -5}, "hidden state"),
        ({"vision_config__model_type": "siglip_vision_model"}, "CLS token"),
        ({"text_config__hidden_size": "wide"}, "configuration"),
        ({"image_grid_pinpoints": [[48, 48]]}, "image processor"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    edit(checkpoint / "config.json", **changes)

    with pytest.raises(ModelError, match=message):
        families.load_encoder(checkpoint)


def test_the_tiling_is_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = tiny_llava_next(tmp_path, side=42, patch_size=14, pinpoints=[(1, 2), (3, 1)])
    assert families.tiling(checkpoint) == Tiling(42, 14, (Size(42, 84), Size(126, 42)))


def test_a_registered_family_is_imported_when_its_first_checkpoint_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_family_of_one.py").write_text("def tiling(path): return path.name")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "one"}')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(families, "_MODULES", dict(families._MODULES))

    families.register("one", "a_family_of_one")
    assert str(families.tiling(checkpoint)) == "checkpoint"
    assert families.supported() == ["llava_next", "one"]
