"""Reading a checkpoint's folder: transformers' own loaders, their errors translated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hired.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def model_type(path: Path) -> str:
    """The ``model_type`` that ``config.json`` names; transformers is not needed for it."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"])
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} holds no config.json: give the folder of a transformers checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path / 'config.json'} is not a transformers configuration ({error})") from error


def num_parameters(path: Path) -> int:
    """Counted from the headers of the weights' files."""
    from safetensors import safe_open

    count = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Translate whatever transformers raises while it reads ``what`` from ``path`` into ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, StrictDataclassError, SafetensorError) as error:
        raise ModelError(
            f"the {what} in {path} cannot be read; copy or download it again ({error})"
        ) from error


def load_weights(half: type[Model], path: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """The model ``half`` with the weights it names, of a checkpoint that may hold more.

    Weights of the checkpoint that ``half`` has no place for are not read from disk. Raises ModelError when
    one is missing: transformers would draw it at random and only warn.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    # transformers knows the weights' older names by model type, but for its own classes only.
    renames = get_checkpoint_conversion_mapping(half.config_class.model_type) or []
    register_checkpoint_conversion_mapping(half.__name__, renames, overwrite=True)
    with reading(path, "weights"):
        model, report = half.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the checkpoint in {path} lacks {len(missing)} weights, {missing[0]} among them")
    model.requires_grad_(False)
    loaded: Model = model.eval().to(device)
    return loaded
