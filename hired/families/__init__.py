"""What differs between checkpoints, one module a family, found by the ``model_type`` in ``config.json``.

A family is a module with three functions (``Family``). Each half is loaded alone: an encode actor never
holds the language model, a generate actor never the vision tower.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch

from hired.devices import resolve_device, resolve_dtype, resolve_handoff_dtype
from hired.engine import EngineOptions
from hired.errors import ModelError
from hired.families.checkpoint import model_type
from hired.packing import Newlines, Positions

if TYPE_CHECKING:
    from hired.encoder import Encoder
    from hired.generator import Generator
    from hired.geometry import Tiling

_MODULES = {"llava_next": "hired.families.llava_next"}


class Family(Protocol):
    """How to read the checkpoints of one ``model_type``; all raise ModelError for what they cannot use."""

    def tiling(self, path: Path) -> Tiling: ...

    def load_encoder(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        handoff_dtype: torch.dtype,
        max_patches: int | None,
        compile: bool,
    ) -> Encoder: ...

    def load_generator(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        newlines: Newlines,
        positions: Positions,
        options: EngineOptions,
    ) -> Generator: ...


def register(model_type: str, module: str) -> None:
    """Let ``module`` read the checkpoints of ``model_type``; it is imported when the first one is met."""
    _MODULES[model_type] = module


def supported() -> list[str]:
    return sorted(_MODULES)


def family(path: Path) -> Family:
    """The family of the checkpoint in the folder ``path``."""
    name = model_type(path)
    if name not in _MODULES:
        raise ModelError(
            f"{path} holds a {name!r} checkpoint, which is not supported; use one of {', '.join(supported())}"
        )
    return cast(Family, importlib.import_module(_MODULES[name]))


def tiling(path: Path) -> Tiling:
    """How the checkpoint cuts pictures; reads its configuration only."""
    return family(path).tiling(path)


def load_encoder(
    path: Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    handoff_dtype: torch.dtype | None = None,
    max_patches: int | None = None,
    compile: bool = False,
) -> Encoder:
    """The half that sees. Defaults are those of ``hired.devices``; for the rest see ``Encoder``."""
    place = resolve_device(device)
    handoff = handoff_dtype or resolve_handoff_dtype(dtype)
    return family(path).load_encoder(path, place, resolve_dtype(dtype, place), handoff, max_patches, compile)


def load_generator(
    path: Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    newlines: Newlines = "rows",
    positions: Positions = "original",
    engine: EngineOptions | None = None,
) -> Generator:
    """The half that speaks. Defaults are those of ``hired.devices``, ``packing`` and ``engine``."""
    place = resolve_device(device)
    return family(path).load_generator(
        path, place, resolve_dtype(dtype, place), newlines, positions, engine or EngineOptions()
    )
