"""The public face: one object that partitions, encodes and generates.

The stages of a job hold one half each and come by it through ``resolve`` and ``hired.families``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hired import embedded, families
from hired.budget import Budget
from hired.devices import resolve_device, resolve_dtype
from hired.engine import GREEDY, EngineOptions, Sampling
from hired.errors import HiredError, ModelError
from hired.partitioning import partition
from hired.types import Caption, Partitions, VisualTokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig

    from hired.encoder import Encoder
    from hired.generator import Generator
    from hired.geometry import Tiling
    from hired.policies import Policy

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: EngineOptions | None = None,
) -> VLM:
    """The model ``"embedded"``, in a folder, or under an id of the Hugging Face hub.

    ``device`` is the GPU if there is one, ``dtype`` float32 on CPUs, bfloat16 or float16 on GPUs. Features
    are handed over as float16, as float32 only when ``dtype`` asks for it. ``engine`` says what generates and
    how much memory it may take. Raises ModelError, with the mend.
    """
    return VLM(resolve(model), device=device, dtype=dtype, engine=engine)


def resolve(model: str | Path) -> Path:
    """The folder of a model's checkpoint, downloaded first if it is a hub id that is not in the cache."""
    if model == "embedded":
        return _embedded()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, str) and HUB_ID.fullmatch(model):
        return _download(model)
    raise ModelError(
        f"{str(model)!r} is no folder: give a checkpoint's folder, a hub id like name/model, or 'embedded'"
    )


class VLM:
    """A vision-language model in two halves, each loaded when first used.

    ``path`` is the checkpoint's folder, ``config`` transformers' configuration of it.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        engine: EngineOptions | None = None,
    ) -> None:
        self.path = path
        self._device = resolve_device(device)
        self._dtype = dtype
        self._engine = engine
        resolve_dtype(dtype, self._device)  # a wrong one is an error now, not after minutes of encoding
        families.family(path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, local_files_only=True)

    @cached_property
    def tiling(self) -> Tiling:
        return families.tiling(self.path)

    @cached_property
    def encoder(self) -> Encoder:
        return families.load_encoder(self.path, device=self._device, dtype=self._dtype)

    @cached_property
    def generator(self) -> Generator:
        return families.load_generator(self.path, device=self._device, dtype=self._dtype, engine=self._engine)

    def partition(self, image: bytes | Image) -> Partitions:
        """The full-image and the sub-images of one picture; raises ImageError."""
        return partition(image, self.tiling)

    def encode(
        self, partitions: Sequence[Partitions], *, budget: Budget, policy: str | Policy = "hired"
    ) -> list[VisualTokens]:
        """The visual tokens of each image that survive dropping, in any mix of grids."""
        return self.encoder.encode(partitions, budget=budget, policy=policy)

    def generate(
        self,
        tokens: Sequence[VisualTokens],
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[Caption]:
        """An answer for each image; one prompt for all or one an image. Greedy unless ``sampling`` says else.

        Raises the first row's error, if any; ``generator.generate`` returns errors row by row instead.
        """
        questions = [prompts] * len(tokens) if isinstance(prompts, str) else prompts
        answers = self.generator.generate(
            tokens, questions, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling
        )
        return [_raised(answer) for answer in answers]


def _raised(answer: Caption | HiredError) -> Caption:
    if isinstance(answer, HiredError):
        raise answer
    return answer


def _embedded() -> Path:
    checkpoint = embedded.CHECKPOINT
    if not (checkpoint / "config.json").is_file():
        raise ModelError(
            f"the embedded model's files are not in {checkpoint}: install the package anew, or train it "
            "with `python jobs/train_embedded.py`"
        )
    return checkpoint


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(CHECKPOINT_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{hub_id!r} is neither a folder here nor in the cache, and the hub did not give it "
            f"({type(error).__name__}): check the name, log in with `hf auth login` if it is gated, or "
            f"download it elsewhere with `hf download {hub_id}` and give the folder"
        ) from error
