"""High-resolution vision-language models with most visual tokens dropped before the language model (HiRED).

vlm = hired.load("embedded")
partitions = vlm.partition(image)
tokens = vlm.encode([partitions], budget=hired.Budget(rate=0.2))
captions = vlm.generate(tokens, ["Describe the image."])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hired.budget import Budget
    from hired.engine import EngineOptions, Sampling
    from hired.errors import (
        CapacityError,
        ConfigurationError,
        GenerationError,
        HiredError,
        ImageError,
        ImageTooLargeError,
        ModelError,
        UnreadableImageError,
    )
    from hired.types import Caption, Grid, Partitions, VisualTokens
    from hired.vlm import VLM, load

__all__ = [
    "VLM",
    "Budget",
    "CapacityError",
    "Caption",
    "ConfigurationError",
    "EngineOptions",
    "GenerationError",
    "Grid",
    "HiredError",
    "ImageError",
    "ImageTooLargeError",
    "ModelError",
    "Partitions",
    "Sampling",
    "UnreadableImageError",
    "VisualTokens",
    "load",
]

# A process that only decodes images never imports torch: what is named here is imported at its first use.
_HOMES = {
    "Budget": "hired.budget",
    "CapacityError": "hired.errors",
    "Caption": "hired.types",
    "ConfigurationError": "hired.errors",
    "EngineOptions": "hired.engine",
    "GenerationError": "hired.errors",
    "Grid": "hired.types",
    "HiredError": "hired.errors",
    "ImageError": "hired.errors",
    "ImageTooLargeError": "hired.errors",
    "ModelError": "hired.errors",
    "Partitions": "hired.types",
    "Sampling": "hired.engine",
    "UnreadableImageError": "hired.errors",
    "VLM": "hired.vlm",
    "VisualTokens": "hired.types",
    "load": "hired.vlm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
