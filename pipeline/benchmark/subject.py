"""What a run measures: its options, the model, the images, and what the device could do at best."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hired import families
from hired.devices import host_memory_bytes, resolve_device, resolve_dtype
from hired.engine import EngineOptions
from hired.engine.memory import workspace_bytes
from hired.errors import ConfigurationError
from hired.families.checkpoint import num_parameters
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.prompts import PromptTemplate
from hired.types import Partitions
from pipeline.benchmark import models, pictures
from pipeline.benchmark.measure import GIB, release
from pipeline.benchmark.roofline import Ceilings, LanguageModel, Tower, measured_ceilings, shapes

BATCHINGS = ("equal", "own")
SECTIONS = ("engine", "latency", "encoder", "stages", "ray", "plan")
# Random weights in bfloat16 are what the presets imitate; other checkpoints run as they do elsewhere.
PRESET_DTYPE = "bfloat16"
# Of a GPU's memory; the rest is CUDA's own.
USABLE_SHARE = 0.9
MAX_PREFILL_TOKENS, MIN_PREFILL_TOKENS = 8192, 1024


@dataclass(frozen=True, slots=True)
class Options:
    """The flags of ``jobs/benchmark.py``."""

    model: str = "embedded"
    sections: tuple[str, ...] = SECTIONS
    arms: tuple[str, ...] = ()
    batchings: tuple[str, ...] = BATCHINGS
    input: Path | None = None
    images: int = 32
    aspect: str = "square"
    prompt: str = "Describe the image."
    max_new_tokens: int = 64
    batch_size: int = 8
    encode_batch_size: int = 8
    baseline_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    latency_images: int = 8
    memory_cap_gib: tuple[float, ...] = ()
    ray_options: tuple[str, ...] = ()
    repeats: int = 3
    device: str | None = None
    dtype: str | None = None
    compile: bool = False
    threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cache: Path = Path("build/models")
    output: Path = Path("output/benchmark")
    add: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.sections) - set(SECTIONS):
            raise ConfigurationError(f"--sections {' '.join(sorted(unknown))}: use {', '.join(SECTIONS)}")
        for name in ("images", "max_new_tokens", "batch_size", "encode_batch_size", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1")
        if self.max_new_tokens < 2:
            raise ConfigurationError(
                "--max-new-tokens must be at least 2: the first one comes from the prefill"
            )


class Subject:
    """The model and the images of a run; ``partitions`` and ``files`` are the same images."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        torch.set_num_threads(options.threads)
        preset = options.model in models.SHAPES
        self.dtype = resolve_dtype(options.dtype or (PRESET_DTYPE if preset else None), self.device)
        self.path = models.checkpoint(options.model, options.cache, self.device)
        self.config: Any = AutoConfig.from_pretrained(self.path, local_files_only=True)
        halves: tuple[Tower, LanguageModel] = shapes(self.config)
        self.tower, self.language = halves
        self.tiling: Tiling = families.tiling(self.path)
        self.files = (
            pictures.found(options.input, options.images, self.tiling)
            if options.input
            else pictures.drawn(options.images, options.aspect)
        )
        known = {file: partition(file, self.tiling) for file in dict.fromkeys(self.files)}
        self.partitions: list[Partitions] = [known[file] for file in self.files]
        self.ceilings = Ceilings(0.0, 0.0)
        self.measure_ceilings()

    @cached_property
    def prompt_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The token ids before and after the image."""
        processor = AutoProcessor.from_pretrained(self.path, local_files_only=True)
        return PromptTemplate(processor, self.config.image_token_id).split(self.options.prompt)

    def measure_ceilings(self) -> None:
        """Measure again; what was higher before stays."""
        scale = 0.05 if self.options.model == "toy" else 1.0
        self.ceilings |= measured_ceilings(self.device, self.dtype, scale=scale)
        release()

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each colour, ``[3, 1, 1]``, as the image processor has them."""
        # Pillow's backend asks for no torchvision.
        processor = AutoImageProcessor.from_pretrained(self.path, backend="pil", local_files_only=True)
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std)
        )
        return mean, std

    def pixel_values(self, image: Partitions) -> Tensor:
        """Float32 ``[k + 1, 3, side, side]``, as the image processor makes them."""
        mean, std = self.normalisation
        return ((torch.from_numpy(image.pixels).permute(0, 3, 1, 2) / 255 - mean) / std).contiguous()

    @cached_property
    def weight_bytes(self) -> int:
        """All weights, both halves, in the dtype that they run in."""
        return num_parameters(self.path) * self.dtype.itemsize

    def sequence_bytes(self, prompt_tokens: float) -> float:
        """The keys and values of a prompt and its answer."""
        per_token = self.language.kv_bytes_per_token(self.dtype)
        return (prompt_tokens + self.options.max_new_tokens) * per_token

    def memory_bytes(self, cap_gib: float | None) -> int:
        """What weights, keys and values may take: the cap, or most of the GPU, or half of the host."""
        if cap_gib is not None:
            return int(cap_gib * GIB)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return int(USABLE_SHARE * total)
        return host_memory_bytes() // 2

    def engine_options(self, memory_bytes: int) -> EngineOptions:
        """Keys and values get what the weights leave of the memory and, on GPUs, what a pass works in.

        Prefill passes shrink until they work in a tenth of the memory.
        """
        if self.device.type != "cuda":
            return EngineOptions(kv_cache_bytes=self._left(memory_bytes, 0))
        num_tokens = MAX_PREFILL_TOKENS
        workspace = partial(workspace_bytes, self.language, self.dtype)
        while num_tokens > MIN_PREFILL_TOKENS and workspace(num_tokens) > memory_bytes / 10:
            num_tokens //= 2
        left = self._left(memory_bytes, workspace(num_tokens))
        return EngineOptions(kv_cache_bytes=left, prefill_tokens=num_tokens)

    def _left(self, memory_bytes: int, workspace_bytes: int) -> int:
        left = memory_bytes - self.weight_bytes - workspace_bytes
        if left <= 0:
            raise ConfigurationError(
                f"{memory_bytes / GIB:.1f} GiB do not hold the weights of {self.path} "
                f"({self.weight_bytes / GIB:.1f} GiB) and a workspace of {workspace_bytes / GIB:.1f} GiB; "
                "raise --memory-cap-gib"
            )
        return left
