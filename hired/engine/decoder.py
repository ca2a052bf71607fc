"""The language model as the engine runs it: the forward of Llama, Mistral and Qwen2 over packed tokens.

The tokens of all sequences lie one after the other, ``[n, d]``, without padding: every matrix product sees
all of them at once, and only attention knows whose they are. Weights and configuration are transformers';
query, key and value projections are fused into one matrix, and so are the gate and up projections, because
a decode step is bound by reading weights and by the number of kernels, not by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from hired.engine import Quantisation
from hired.engine.quantisation import quantise
from hired.errors import ModelError

SUPPORTED = ("llama", "mistral", "qwen2")
# Their frequencies change with the length of the longest sequence in the batch: no answer would be its own.
_CHANGING_ROPE = ("dynamic", "longrope")

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the KV cache and attention need to know. ``windows`` holds each layer's sliding window or None."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Decoder:
    """A causal language model of transformers, its layers rebuilt around fused matrices.

    Takes the layers of ``model`` apart: afterwards only this object can run them. ``device`` is where the
    weights end up; quantised weights are made there, layer by layer, so that the full ones never have to
    fit. Raises ModelError for families and settings that it does not know.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device | None = None,
        quantisation: Quantisation = "none",
    ) -> None:
        check_supported(model.config.get_text_config())
        decoder = model.get_decoder()
        self.config = decoder.config
        self.device = device or decoder.embed_tokens.weight.device
        self._embed = decoder.embed_tokens.to(self.device)
        self._layers = [
            _Layer.take(layer, self.device, quantisation)
            for layer in decoder.layers[: self.config.num_hidden_layers]
        ]
        self._norm = decoder.norm.to(self.device)
        self._head = model.get_output_embeddings().to(self.device)
        self._rotary = _rotary_table(decoder.rotary_emb.to(self.device), self.max_positions, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._embed.weight.dtype
        return dtype

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def shape(self) -> Shape:
        config = self.config
        return Shape(
            num_layers=len(self._layers),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            windows=_windows(config),
            dtype=self.dtype,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings ``[n, d]`` of ids ``[n]``."""
        embeddings: Tensor = self._embed(token_ids)
        return embeddings

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The last layer's states ``[n, d]``.

        ``attend(layer, queries, keys, values)`` gets ``[n, heads, head_dim]``, or ``[n, kv_heads,
        head_dim]``, and gives what each token gathers, ``[n, heads * head_dim]``.
        """
        cos, sin = self._rotary[:, positions]
        states = embeddings
        for index, layer in enumerate(self._layers):
            states = layer(index, states, cos, sin, attend)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Float32 ``[m, vocabulary]`` of some of the last layer's states ``[m, d]``."""
        logits: Tensor = self._head(_normed(self._norm, states))
        return logits.float()


class _Layer:
    """One decoder layer over packed tokens."""

    def __init__(self, layer: Any, qkv: nn.Module, gate_up: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim: int = attention.head_dim
        self._num_heads: int = attention.config.num_attention_heads
        self._num_kv_heads: int = attention.config.num_key_value_heads
        self._before_attention, self._before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv, self._out = qkv, attention.o_proj
        self._gate_up, self._down = gate_up, mlp.down_proj
        self._act = ACT2FN[attention.config.hidden_act]

    @classmethod
    def take(cls, layer: Any, device: torch.device, quantisation: Quantisation) -> _Layer:
        """From a layer of transformers, whose own matrices are given up one after the other."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = _fused(attention, ("q_proj", "k_proj", "v_proj")).to(device)
        gate_up = _fused(mlp, ("gate_proj", "up_proj")).to(device)
        layer.to(device)
        for module in (qkv, gate_up, attention.o_proj, mlp.down_proj):
            quantise(module, quantisation)
        return cls(layer, qkv, gate_up)

    def __call__(self, index: int, states: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        qkv = self._qkv(_normed(self._before_attention, states)).view(len(states), -1, self._head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = _rotate(qkv[:, :num_rotated], cos, sin)
        queries, keys = torch.split(rotated, [self._num_heads, self._num_kv_heads], dim=1)
        states = states + self._out(attend(index, queries, keys, qkv[:, num_rotated:]))
        gate, up = self._gate_up(_normed(self._before_mlp, states)).chunk(2, dim=-1)
        output: Tensor = states + self._down(self._act(gate) * up)
        return output


def check_supported(config: Any) -> None:
    """Raises ModelError for a language model that only transformers itself can run."""
    if config.model_type not in SUPPORTED:
        raise ModelError(
            f"the continuous engine runs {', '.join(SUPPORTED)}, not {config.model_type}; "
            "choose the engine 'transformers'"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _CHANGING_ROPE:
        raise ModelError(
            f"rope type {rope_type!r} depends on what else is in the batch, which the continuous engine "
            "does not follow; choose the engine 'transformers'"
        )


def _fused(owner: Any, names: tuple[str, ...]) -> nn.Linear:
    """One linear layer in place of several with the same input, which are taken out of ``owner``."""
    parts = [getattr(owner, name) for name in names]
    first = parts[0].weight
    biased = parts[0].bias is not None
    fused = nn.Linear(first.shape[1], sum(part.out_features for part in parts), bias=biased, device="meta")
    fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if biased:
        fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    for name in names:
        delattr(owner, name)
    return fused


def _normed(norm: Any, states: Tensor) -> Tensor:
    return functional.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotary_table(rotary: Any, max_positions: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines ``[2, positions, 1, head_dim / 2]`` as the checkpoint's RoPE scaling says."""
    positions = torch.arange(max_positions, device=rotary.inv_freq.device)
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions[None])
    half = cos.shape[-1] // 2  # transformers repeats every frequency
    return torch.stack([cos[0, :, None, :half], sin[0, :, None, :half]]).to(dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of ``[n, heads, head_dim]``, halves paired as in Llama."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window. Qwen2 has it in some layers only and says which."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
