"""Weights in fewer bits, by torchao: the language model of a 7B then fits a card of 16 GB.

Only weights are quantised, and products run in the model's own precision. int8 keeps 7.0 GB of a 7B's
13.5 GB, int4 in groups of 128 keeps 3.9 GB.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hired.devices import FIRST_BFLOAT16_GPU
from hired.engine import Quantisation
from hired.errors import ConfigurationError

GROUP_SIZE = 128


def quantise(module: nn.Module, quantisation: Quantisation) -> None:
    """Quantises the weights of a linear layer in place, on the device where it is.

    Raises ConfigurationError where torchao is missing or has no kernel for this device.
    """
    if quantisation == "none":
        return
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ConfigurationError(
            f"quantisation {quantisation} needs torchao: pip install 'hired[quantisation]'"
        ) from error
    quantize_(module, _recipe(module, quantisation))


def _recipe(module: nn.Module, quantisation: Quantisation) -> Any:
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if quantisation == "int8":
        return Int8WeightOnlyConfig(version=2)
    weight: Any = module.weight
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < FIRST_BFLOAT16_GPU:
        raise ConfigurationError(
            "int4 weights need a GPU of compute capability 8.0 or higher; use int8 on this device"
        )
    if weight.dtype != torch.bfloat16:
        raise ConfigurationError(f"int4 weights need bfloat16, not {weight.dtype}; change dtype, or use int8")
    return Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
