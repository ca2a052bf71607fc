"""High-resolution vision-language models with most visual tokens dropped before the language model (HiRED).

vlm = hired.load("embedded")
partitions = vlm.partition(image)
tokens = vlm.encode([partitions], budget=hired.Budget(rate=0.2))
captions = vlm.generate(tokens, ["Describe the image."])
"""

from __future__ import annotations

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
