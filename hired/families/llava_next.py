"""LLaVA-NeXT: a CLIP tower, a two-layer projector, a Llama or Mistral that reads canvas row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoImageProcessor, AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration

from hired.encoder import Encoder
from hired.engine import EngineOptions
from hired.engine.factory import new_engine
from hired.engine.vllm_engine import language_model_folder, write_language_model
from hired.errors import ConfigurationError, ModelError
from hired.families.checkpoint import load_weights, reading
from hired.generator import Generator
from hired.geometry import Tiling
from hired.packing import Newlines, Positions
from hired.prompts import PromptTemplate
from hired.types import Size

BICUBIC = 3  # PIL's number, as image processors write it


class LlavaNextVisionHalf(LlavaNextForConditionalGeneration):  # type: ignore[misc]  # transformers is untyped
    """Only the tower. ``from_pretrained`` builds on the meta device, so what is deleted never had memory."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        "language_model", "lm_head", "multi_modal_projector", "image_newline",
    ]  # fmt: skip
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        del (
            self.lm_head,
            self.model.language_model,
            self.model.multi_modal_projector,
            self.model.image_newline,
        )


class LlavaNextLanguageHalf(LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """All but the tower."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["vision_tower"]

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        del self.model.vision_tower


def tiling(path: Path) -> Tiling:
    """Side and patch size of the tower, canvases of the configuration."""
    return _tiling(_config(path), _image_processor(path), path)


def load_encoder(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    handoff_dtype: torch.dtype,
    max_patches: int | None,
    compile: bool,
) -> Encoder:
    """The tower and what prepares its pixels."""
    config, processor = _config(path), _image_processor(path)
    half = load_weights(LlavaNextVisionHalf, path, device, dtype)
    return Encoder(
        half.model.vision_tower,
        _tiling(config, processor, path),
        feature_layer=config.vision_feature_layer,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        handoff_dtype=handoff_dtype,
        max_patches=max_patches,
        compile=compile,
    )


def load_generator(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    newlines: Newlines,
    positions: Positions,
    options: EngineOptions,
) -> Generator:
    """Projector and language model, with the engine of the options and the checkpoint's own chat template."""
    config = _config(path)
    with reading(path, "processor"):
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    prompts = PromptTemplate(processor, config.image_token_id)
    if options.name == "vllm" and positions != "compact":
        raise ConfigurationError("the engine 'vllm' counts positions itself: set positions to compact")
    # What is still to be quantised, or is vLLM's to load, waits on the host: it may not fit the device twice.
    elsewhere = options.quantisation != "none" or options.name == "vllm"
    half = load_weights(LlavaNextLanguageHalf, path, torch.device("cpu") if elsewhere else device, dtype)
    engine = new_engine(
        half,
        device,
        options,
        eos_token_ids=_eos_token_ids(half),
        decode=prompts.decode,
        export=lambda: language_model_folder(
            path, dtype, lambda folder: write_language_model(half, processor.tokenizer, folder)
        ),
    )
    return Generator(
        engine,
        prompts,
        projector=half.model.multi_modal_projector.to(device),
        embed_tokens=half.get_input_embeddings().to(device),
        image_newline=half.model.image_newline.to(device),
        patches_per_side=config.vision_config.image_size // config.vision_config.patch_size,
        newlines=newlines,
        positions=positions,
    )


def _config(path: Path) -> LlavaNextConfig:
    """The configuration, of a kind that token dropping by the CLS token's attention can serve."""
    with reading(path, "configuration"):
        config = LlavaNextConfig.from_pretrained(path, local_files_only=True)
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise ModelError(
            f"{path}: tokens are chosen by the CLS token, which a {tower.model_type} tower has not; use CLIP"
        )
    if config.vision_feature_select_strategy != "default":
        raise ModelError(
            f"{path}: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, "
            "only 'default' (patches without the CLS token) is supported"
        )
    return config


def _image_processor(path: Path) -> Any:
    with reading(path, "image processor"):
        return AutoImageProcessor.from_pretrained(path, local_files_only=True)


def _tiling(config: LlavaNextConfig, processor: Any, path: Path) -> Tiling:
    """The tiling of the configuration, with which the image processor must agree."""
    side = config.vision_config.image_size
    expected = (config.image_grid_pinpoints, side, BICUBIC)
    found = (processor.image_grid_pinpoints, processor.crop_size["height"], processor.resample)
    if found != expected:
        raise ModelError(
            f"{path}: pinpoints, sub-image side and resampling are {expected} for the model "
            f"but {found} for its image processor"
        )
    pinpoints = tuple(Size(height, width) for height, width in config.image_grid_pinpoints)
    return Tiling(side, config.vision_config.patch_size, pinpoints)


def _eos_token_ids(model: LlavaNextForConditionalGeneration) -> list[int]:
    """All ids that end an answer: one, several or none in ``generation_config``."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return [eos] if isinstance(eos, int) else list(eos or [])
