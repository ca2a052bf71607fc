"""The engine that the options ask for, around a loaded language model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from hired.engine import Engine, EngineOptions
from hired.engine.continuous import ContinuousEngine
from hired.engine.decoder import Decoder, check_supported
from hired.engine.shared import SharedEngine
from hired.engine.transformers_engine import TransformersEngine
from hired.engine.vllm_engine import VllmEngine
from hired.errors import ConfigurationError, ModelError


def new_engine(
    model: Any,
    device: torch.device,
    options: EngineOptions,
    *,
    eos_token_ids: Collection[int],
    decode: Callable[[Sequence[int]], str],
    export: Callable[[], Path],
) -> Engine:
    """An engine on ``device`` for a causal language model of transformers, which it may take apart.

    ``export`` gives a folder with the language model alone, for engines that load it themselves.
    Raises ModelError for a model that the engine does not know, ConfigurationError for options that it
    cannot follow.
    """
    if options.name == "vllm":
        folder = export()
        model.get_decoder().layers = torch.nn.ModuleList()  # vLLM has its own
        return SharedEngine(
            VllmEngine(folder, dtype=model.dtype, eos_token_ids=eos_token_ids, decode=decode, options=options)
        )
    if _is_continuous(model, options):
        decoder = Decoder(model, device=device, quantisation=options.quantisation)
        return SharedEngine(
            ContinuousEngine(decoder, eos_token_ids=eos_token_ids, decode=decode, options=options)
        )
    if options.quantisation != "none":
        raise ConfigurationError(
            f"quantisation {options.quantisation} needs the engine 'continuous', which this model or these "
            "options exclude"
        )
    return TransformersEngine(model.to(device), eos_token_ids=eos_token_ids, decode=decode)


def _is_continuous(model: Any, options: EngineOptions) -> bool:
    if options.name == "transformers":
        return False
    try:
        check_supported(model.config.get_text_config())
    except ModelError:
        if options.name == "continuous":
            raise
        return False
    return True
