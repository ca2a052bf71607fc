"""The arms: who answers the prompts. All see the same partitions and the same prompt, greedily.

A *system* is loaded weights; several arms share it. Ours is the encoder and an engine; transformers' is one
``LlavaNextForConditionalGeneration`` whose ``generate`` gets left-padded batches, with all visual tokens
(from the pixels) or with those that our encoder kept.
"""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaNextForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hired import families
from hired.budget import Budget
from hired.encoder import Encoder
from hired.engine import EngineOptions
from hired.engine.kv_cache import ALIGNMENT
from hired.errors import ConfigurationError
from hired.geometry import unpadded
from hired.packing import layout, pack
from hired.types import Caption, Partitions, VisualTokens
from pipeline.benchmark.measure import now, release
from pipeline.benchmark.subject import Subject


@dataclass(frozen=True, slots=True)
class Arm:
    """Which system, and which visual tokens it gets. ``rate`` None: all, as the system gets them itself."""

    system: str
    title: str
    rate: float | None

    @property
    def policy(self) -> str:
        return "keep-all" if self.rate is None else "hired"

    @property
    def budget(self) -> Budget:
        return Budget(rate=self.rate or 1.0)


ARMS: dict[str, Arm] = {
    "keep-all": Arm("engine", "keep-all", None),
    "hired-40": Arm("engine", "hired 40 %", 0.4),
    "hired-20": Arm("engine", "hired 20 %", 0.2),
    "hired-10": Arm("engine", "hired 10 %", 0.1),
    "transformers": Arm("transformers", "transformers generate, all tokens", None),
    "transformers-20": Arm("transformers", "transformers generate, hired 20 %", 0.2),
    "vllm": Arm("vllm", "vLLM, keep-all", None),
    "vllm-20": Arm("vllm", "vLLM, hired 20 %", 0.2),
}


def chosen(names: Sequence[str]) -> dict[str, Arm]:
    """The arms of these names, all without any; raises ConfigurationError."""
    if unknown := set(names) - set(ARMS):
        raise ConfigurationError(f"--arms {' '.join(sorted(unknown))}: use {', '.join(ARMS)}")
    return {name: arm for name, arm in ARMS.items() if not names or name in names}


def is_installed(system: str) -> bool:
    return system != "vllm" or importlib.util.find_spec("vllm") is not None


@dataclass(frozen=True, slots=True)
class Work:
    """What a trial took. ``encode_s`` is None where it cannot be told from generating.

    ``first_token_s`` holds, for each image, the seconds since its batch was begun.
    """

    total_s: float
    encode_s: float | None
    prompt_tokens: tuple[int, ...]
    completion_tokens: int
    first_token_s: tuple[float, ...] = ()


class System(Protocol):
    """Loaded weights that run the rows of a subject.

    ``reserved_bytes`` of the device are set aside for keys and values, used or not.
    """

    reserved_bytes: int

    def run(self, arm: Arm, rows: Sequence[int], batch: int | None, *, max_new_tokens: int) -> Work:
        """Encode and generate, ``batch`` rows at a time; None hands over all of them at once."""
        ...

    def run_watching(self, arm: Arm, rows: Sequence[int], batch: int) -> Work:
        """The same, with the time of every first token."""
        ...


@contextmanager
def loaded(system: str, subject: Subject, options: EngineOptions) -> Iterator[System]:
    """The system of this name, after one small answer; its memory is given back at the end."""
    made = _SYSTEMS[system](subject, options)
    smallest = min((arm for arm in ARMS.values() if arm.system == system), key=lambda arm: arm.rate or 1)
    made.run(smallest, [0], 1, max_new_tokens=2)
    try:
        yield made
    finally:
        vars(made).clear()  # whoever still holds the object holds no weights
        release()


class EngineSystem:
    """Our encoder, and our generator with one of its engines."""

    def __init__(self, subject: Subject, options: EngineOptions) -> None:
        self._subject = subject
        self.encoder = load_encoder(subject)
        self.generator = families.load_generator(
            subject.path,
            device=subject.device,
            dtype=subject.dtype,
            positions="compact" if options.name == "vllm" else "original",
            engine=options,
        )
        self.reserved_bytes = options.kv_cache_bytes or 0

    def encode(self, arm: Arm, rows: Sequence[int]) -> list[VisualTokens]:
        """The visual tokens of these rows that the arm keeps."""
        images = [self._subject.partitions[row] for row in rows]
        return self.encoder.encode(images, budget=arm.budget, policy=arm.policy)

    def run(self, arm: Arm, rows: Sequence[int], batch: int | None, *, max_new_tokens: int) -> Work:
        """See System."""
        encode_s, start = 0.0, now(self._subject.device)
        prompts: list[int] = []
        completion_tokens = 0
        for part in parts(rows, batch):
            begun = now(self._subject.device)
            tokens = self.encode(arm, part)
            encode_s += now(self._subject.device) - begun
            of_part, num_new = self.generate(tokens, max_new_tokens)
            prompts += of_part
            completion_tokens += num_new
        total_s = now(self._subject.device) - start
        return Work(total_s, encode_s, tuple(prompts), completion_tokens)

    def generate(self, tokens: Sequence[VisualTokens], max_new_tokens: int) -> tuple[list[int], int]:
        """Lengths of the prompts, and how many tokens came out in all; raises the first row's error."""
        prompts = [self._subject.options.prompt] * len(tokens)
        captions = []
        for answer in self.generator.generate(tokens, prompts, max_new_tokens=max_new_tokens):
            if isinstance(answer, Exception):
                raise answer
            captions.append(answer)
        num_new = sum(caption.completion_tokens for caption in captions)
        return [caption.prompt_tokens for caption in captions], num_new

    def run_watching(self, arm: Arm, rows: Sequence[int], batch: int) -> Work:
        """See System."""
        device, options = self._subject.device, self._subject.options
        first: list[float] = []
        captions: list[Caption] = []
        start = now(device)
        for part in parts(rows, batch):
            begun = now(device)
            seen: dict[int, float] = {}
            tokens = self.encode(arm, part)
            for piece in self.generator.stream(
                tokens, [options.prompt] * len(part), max_new_tokens=options.max_new_tokens
            ):
                seen.setdefault(piece.index, time.perf_counter() - begun)  # a piece is there when it is told
                if isinstance(piece.caption, Exception):
                    raise piece.caption
                if piece.caption is not None:
                    captions.append(piece.caption)
            first += seen.values()
        prompts = tuple(caption.prompt_tokens for caption in captions)
        num_new = sum(caption.completion_tokens for caption in captions)
        return Work(now(device) - start, None, prompts, num_new, tuple(first))


class TransformersSystem:
    """What a user would write with transformers alone; our encoder drops tokens before the pruned arm."""

    reserved_bytes = 0

    def __init__(self, subject: Subject, options: EngineOptions) -> None:
        del options  # its cache grows as it goes
        self._subject = subject
        self._model: Any = LlavaNextForConditionalGeneration.from_pretrained(
            subject.path, dtype=subject.dtype, local_files_only=True
        )
        self._model.requires_grad_(False).eval().to(subject.device)
        mean, std = (values.flatten().tolist() for values in subject.normalisation)
        self._encoder = Encoder(
            self._model.model.vision_tower,
            subject.tiling,
            feature_layer=subject.config.vision_feature_layer,
            image_mean=mean,
            image_std=std,
        )
        # The processor's work, done before any clock runs.
        self._pixels = [subject.pixel_values(image) for image in subject.partitions]

    def run(self, arm: Arm, rows: Sequence[int], batch: int | None, *, max_new_tokens: int) -> Work:
        """See System."""
        return self._run(arm, rows, batch, max_new_tokens, None)

    def run_watching(self, arm: Arm, rows: Sequence[int], batch: int) -> Work:
        """See System."""
        watch = _FirstToken(self._subject.device)
        return self._run(arm, rows, batch, self._subject.options.max_new_tokens, watch)

    @torch.inference_mode()
    def _run(
        self, arm: Arm, rows: Sequence[int], batch: int | None, max_new_tokens: int, watch: _FirstToken | None
    ) -> Work:
        device = self._subject.device
        start, completion_tokens = now(device), 0
        prompts: list[int] = []
        first: list[float] = []
        for part in parts(rows, batch):
            begun = now(device)
            lengths, inputs = (self._whole if arm.rate is None else self._pruned)(arm, part)
            if watch:
                watch.reset()
            # The prompt comes back in front of the answer only where it was given as ids.
            ids = self._model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=watch
            )
            num_prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            completion_tokens += self._num_new(ids[:, num_prompt:])
            prompts += lengths
            if watch and watch.at_s is not None:
                first += [watch.at_s - begun] * len(part)
        return Work(now(device) - start, None, tuple(prompts), completion_tokens, tuple(first))

    def _num_new(self, ids: Tensor) -> int:
        """The tokens ``[b, n]`` that came before each row's end of sequence."""
        eos = self._model.generation_config.eos_token_id
        if eos is None:
            return ids.numel()
        ended = torch.isin(ids, torch.as_tensor(eos, device=ids.device)).cumsum(-1) > 0
        return int((~ended).sum())

    def _whole(self, arm: Arm, rows: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        images = [self._subject.partitions[row] for row in rows]
        pixels = pad_sequence([self._pixels[row] for row in rows], batch_first=True)
        sizes = [[image.original_size.height, image.original_size.width] for image in images]
        lengths, inputs = self._prompts([num_visual(self._subject, image) for image in images])
        return lengths, inputs | {
            "pixel_values": pixels.to(self._subject.device),
            "image_sizes": torch.tensor(sizes, device=self._subject.device),
        }

    def _pruned(self, arm: Arm, rows: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        """The kept tokens' embeddings in place of the pixels, as ``generate`` takes them.

        A transformers that takes no finished visual embeddings (5.17) gets those of the whole prompt.
        """
        images = [self._subject.partitions[row] for row in rows]
        kept = self._encoder.encode(images, budget=arm.budget, policy=arm.policy)
        visual = [self._packed(tokens) for tokens in kept]
        lengths, inputs = self._prompts([len(image) for image in visual])
        if "mm_encoder_outputs" in inspect.signature(self._model.forward).parameters:
            encoded = BaseModelOutputWithPooling(pooler_output=visual)
            return lengths, inputs | {"mm_encoder_outputs": {"image": encoded}}
        ids = inputs.pop("input_ids")
        embeddings = self._model.get_input_embeddings()(ids)
        embeddings[ids == self._subject.config.image_token_id] = torch.cat(visual)
        return lengths, inputs | {"inputs_embeds": embeddings}

    def _packed(self, tokens: VisualTokens) -> Tensor:
        model = self._model.model
        features = model.multi_modal_projector(tokens.features.to(model.image_newline))
        places = layout(tokens, self._subject.tiling.patches_per_side)
        return pack(places, features, model.image_newline)

    def _prompts(self, num_visual_tokens: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        """Lengths, and the ids and mask of the prompts, padded on the left."""
        prefix, suffix = self._subject.prompt_ids
        image = self._subject.config.image_token_id
        rows = [torch.tensor([*prefix, *[image] * number, *suffix]) for number in num_visual_tokens]
        masks = [torch.ones_like(row) for row in rows]
        ids, mask = (
            pad_sequence(columns, batch_first=True, padding_side="left").to(self._subject.device)
            for columns in (rows, masks)
        )
        return [len(row) for row in rows], {"input_ids": ids, "attention_mask": mask}


class _FirstToken(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when the first new tokens come; ``generate`` hands over the prompt before them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._calls = 0
        self.at_s: float | None = None

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:
            self.at_s = now(self._device)

    def end(self) -> None:
        """Nothing is buffered."""


def _vllm(subject: Subject, options: EngineOptions) -> EngineSystem:
    """Our encoder before vLLM, which takes its share of the device's memory in one piece."""
    share = {}
    if subject.device.type == "cuda":
        total = torch.cuda.get_device_properties(subject.device).total_memory
        kept = (options.kv_cache_bytes or 0) + subject.weight_bytes
        share = {"gpu_memory_utilization": round(kept / total, 3)}
    return EngineSystem(subject, EngineOptions("vllm", kv_cache_bytes=options.kv_cache_bytes, vllm=share))


_SYSTEMS: dict[str, Callable[[Subject, EngineOptions], Any]] = {
    "engine": EngineSystem,
    "transformers": TransformersSystem,
    "vllm": _vllm,
}


def load_encoder(subject: Subject) -> Encoder:
    """Our encoder as the run's options want it."""
    return families.load_encoder(
        subject.path, device=subject.device, dtype=subject.dtype, compile=subject.options.compile
    )


def parts(rows: Sequence[int], batch: int | None) -> Iterator[Sequence[int]]:
    """The rows, ``batch`` at a time; all at once without one."""
    size = batch or len(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def num_visual(subject: Subject, image: Partitions) -> int:
    """The visual tokens of an image with its newlines when all are kept."""
    per_side = subject.tiling.patches_per_side
    box = unpadded(image.original_size, image.grid, per_side)
    return per_side**2 + box.height * (box.width + 1)


def largest_batch(subject: Subject, prompt_tokens: float, kv_cache_bytes: int) -> int:
    """How many sequences of this length the KV cache holds, by whole extents, as the engine admits them."""
    places = -(-int(prompt_tokens + subject.options.max_new_tokens) // ALIGNMENT) * ALIGNMENT
    return kv_cache_bytes // subject.language.kv_bytes_per_token(subject.dtype) // places
