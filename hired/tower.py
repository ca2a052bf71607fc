"""A CLIP tower of transformers, run layer by layer, so that what CLS attends to can be read on the way.

Runs up to the layer whose output is wanted; those above are never run, and may be missing. The last one's
output projection and MLP wait until it is known which patches are kept. Its attention runs for all: queries
and the fused kernel are 2.6 of a ViT-L/14-336 layer's 16 GFLOP a partition, so sparing four fifths of them
would save half a percent of the tower.

Elementwise work is done in place, to the same bits as in transformers: on CPUs, where it is bound by memory,
the activation takes half the time. Compilation fuses it with its neighbours. One matrix product for queries,
keys and values was measured too, and gained nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.activations import QuickGELUActivation

from hired.attention import Attention
from hired.errors import ModelError


class Tower:
    """The modules of a ``CLIPVisionModel``, with fused attention whatever the module's own setting.

    Raises ModelError for modules that are no CLIP tower.
    """

    def __init__(self, module: Any) -> None:
        if not (hasattr(module, "pre_layrnorm") and hasattr(module.embeddings, "class_embedding")):
            raise ModelError(
                f"{type(module).__name__} is no CLIP vision tower, whose CLS token's attention HiRED reads"
            )
        self._module = module
        self._layers = module.encoder.layers

    @property
    def device(self) -> torch.device:
        device: torch.device = self._module.embeddings.patch_embedding.weight.device
        return device

    @property
    def side(self) -> int:
        return int(self._module.config.image_size)

    @property
    def patch_size(self) -> int:
        return int(self._module.config.patch_size)

    @property
    def num_layers(self) -> int:
        """The layers that are there; a checkpoint may have been loaded without its last ones."""
        return len(self._layers)

    def layer_of(self, hidden_state: int) -> int:
        """The layer, counted from 0, whose output ``hidden_states[hidden_state]`` is."""
        if not isinstance(hidden_state, int):
            raise ModelError(f"features of several layers at once, {hidden_state}, are not supported")
        from_top = self._module.config.num_hidden_layers + hidden_state
        layer = hidden_state - 1 if hidden_state >= 0 else from_top
        if not 0 <= layer < self.num_layers:
            raise ModelError(f"hidden state {hidden_state} is the output of none of {self.num_layers} layers")
        return layer

    def look(
        self,
        pixels: Tensor,
        last_layer: int,
        read_layers: Collection[int] = (),
        *,
        compiled: bool = False,
    ) -> Sight:
        """Runs up to the attention of ``last_layer``, reading what CLS attends to in ``read_layers``.

        ``pixels`` are normalised, ``[n, 3, side, side]``; they are rounded to the tower's dtype. The layers
        between run ``compiled`` for this very ``n``: a wait of seconds to a minute the first time.
        """
        through = _compiled() if compiled else _through
        states = self._module.pre_layrnorm(self._module.embeddings(pixels))
        by_head = {}
        for index, layer in enumerate(self._layers[:last_layer]):
            if index in read_layers:
                attention = _attention(layer, states)
                by_head[index] = attention.from_cls_by_head()
                states = _after_attention(layer, states, attention.context())
            else:
                states = through(layer, states)
        last = self._layers[last_layer]
        above = self._layers[last_layer + 1] if last_layer + 1 < self.num_layers else None
        attention = _attention(last, states)
        if last_layer in read_layers:
            by_head[last_layer] = attention.from_cls_by_head()
        from_cls = {index: heads.sum(1) for index, heads in by_head.items()}
        return Sight(last, above, states, attention.keys, attention.context(), from_cls, by_head)


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """Partitions in the middle of a layer: its attention is done, its output projection and MLP are not.

    ``above`` is the next layer, None where there is none. ``states`` and ``context`` are
    ``[n, 1 + patches, d]``, ``keys_by_head`` ``[n, heads, 1 + patches, d_head]``; ``from_cls`` holds float32
    ``[n, patches]`` by layer, ``from_cls_by_head`` ``[n, heads, patches]``, of which it is the sum.
    """

    layer: Any
    above: Any
    states: Tensor
    keys_by_head: Tensor
    context: Tensor
    from_cls: Mapping[int, Tensor]
    from_cls_by_head: Mapping[int, Tensor]

    def features_at(self, partition: Tensor, patch: Tensor) -> Tensor:
        """The layer's output ``[m, d]`` at ``m`` patches alone."""
        token = patch + 1  # CLS comes first
        return _after_attention(self.layer, self.states[partition, token], self.context[partition, token])

    def features(self) -> Tensor:
        """The layer's output at all patches, ``[n, patches, d]``."""
        return self._output()[:, 1:]

    def keys(self) -> Tensor:
        """The layer's keys at all patches, heads joined, ``[n, patches, d]``."""
        return self.keys_by_head.transpose(1, 2).flatten(2)[:, 1:]

    def single_head(self, layers_above: int) -> tuple[Tensor, Tensor]:
        """What CLS would attend to with one head as wide as all, float32 ``[n, patches]``, and the keys.

        softmax(q_cls k^T / sqrt(d)), CLS's attention to itself left out; keys are ``[n, patches, d]``. Of
        this layer, or of the one above, of which nothing else is run. Raises ModelError where there is none.
        """
        if layers_above and self.above is None:
            raise ModelError(
                "the layer above the feature layer is not there; choose a policy that does not read it, or "
                "PruMerge(layers_above=0)"
            )
        layer, states = (self.above, self._output()) if layers_above else (self.layer, self.states)
        states = layer.layer_norm1(states)
        keys = layer.self_attn.k_proj(states)
        query = layer.self_attn.q_proj(states[:, :1])
        logits = query.float() @ keys.float().transpose(-1, -2) * keys.shape[-1] ** -0.5
        return logits.softmax(-1)[:, 0, 1:], keys[:, 1:]

    def _output(self) -> Tensor:
        """The layer's output, CLS included."""
        return _after_attention(self.layer, self.states, self.context)


def _through(layer: Any, states: Tensor) -> Tensor:
    return _after_attention(layer, states, _attention(layer, states).context())


@cache
def _compiled() -> Callable[[Any, Tensor], Tensor]:
    """``_through`` compiled once for all layers of a tower, which share their code, and each batch size."""
    return torch.compile(_through, dynamic=False)


def _attention(layer: Any, states: Tensor) -> Attention:
    return Attention.of(layer.self_attn, layer.layer_norm1(states))


def _after_attention(layer: Any, states: Tensor, context: Tensor) -> Tensor:
    states = layer.self_attn.out_proj(context).add_(states)
    hidden = layer.mlp.fc1(layer.layer_norm2(states))
    output: Tensor = layer.mlp.fc2(_activated(hidden, layer.mlp.activation_fn)).add_(states)
    return output


def _activated(hidden: Tensor, activation: Any) -> Tensor:
    if isinstance(activation, QuickGELUActivation):  # CLIP's own: x * sigmoid(1.702 x)
        return hidden.mul_((1.702 * hidden).sigmoid_())
    activated: Tensor = activation(hidden)
    return activated
