"""What CLS attends to, read beside fused attention, and the choice of the patches it attends to most.

The full attention map of one ViT-L/14-336 partition takes 21 MB in float32, and only its CLS row is wanted:
softmax(q_cls k^T * scale), from the layer's own queries and keys. The layer itself keeps the fused kernel,
but for one case: torch's for CPUs is slow in bfloat16. Where the CPU has instructions for it, two matrix
products with a softmax between them, a few heads at a time, take half as long (16 heads of 577 tokens on one
core with AVX-512: 11 against 23 ms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Scores that fit a core's second-level cache; eight times as many are a fifth slower.
BLOCK_BYTES = 1 << 20

_CPU = torch.cpu.get_capabilities()
# AMX stays with the fused kernel, which is written for it.
_FUSED_IS_SLOW_IN_BFLOAT16 = _CPU.get("avx512_bf16", False) and not _CPU.get("amx_bf16", False)


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One self-attention layer at work on a batch.

    Queries, keys and values are ``[n, heads, 1 + patches, d_head]``; token 0 is CLS.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    @classmethod
    def of(cls, module: Any, states: Tensor) -> Attention:
        """From a ``CLIPAttention`` of transformers and its input ``[n, 1 + patches, d]``."""

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*states.shape[:2], -1, module.head_dim).transpose(1, 2)

        return cls(
            heads(module.q_proj(states)),
            heads(module.k_proj(states)),
            heads(module.v_proj(states)),
            module.scale,
        )

    def context(self) -> Tensor:
        """What each token gathers, ``[n, 1 + patches, d]``, heads joined, before the output projection."""
        in_bfloat16_on_cpu = self.queries.dtype == torch.bfloat16 and self.queries.device.type == "cpu"
        gather = (
            attention_in_blocks
            if in_bfloat16_on_cpu and _FUSED_IS_SLOW_IN_BFLOAT16
            else scaled_dot_product_attention
        )
        gathered = gather(self.queries, self.keys, self.values, scale=self.scale)
        return gathered.transpose(1, 2).flatten(2)

    def from_cls(self) -> Tensor:
        """The attention of CLS to each patch, summed over heads: float32 ``[n, patches]``."""
        return self.from_cls_by_head().sum(1)

    def from_cls_by_head(self) -> Tensor:
        """The attention of CLS to each patch in each head, float32 ``[n, heads, patches]``.

        CLS's attention to itself counts in the softmax and is then left out. In float32 whatever the layer
        runs in: eight bits of bfloat16 would tie patches that differ.
        """
        logits = self.queries[:, :, :1].float() @ self.keys.float().transpose(-1, -2) * self.scale
        return logits.softmax(-1)[:, :, 0, 1:]


def attention_in_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, block_bytes: int = BLOCK_BYTES
) -> Tensor:
    """Attention ``[n, heads, tokens, d_head]`` with ``block_bytes`` of scores at once, or those of one head.

    Scores are rounded to the dtype of the queries before the softmax, as in eager attention.
    """
    shape, num_tokens = queries.shape, queries.shape[-2]
    num_heads = max(1, block_bytes // (num_tokens * keys.shape[-2] * queries.element_size()))
    ignored = queries.new_zeros(())
    blocks = zip(
        *(torch.split(tensor.flatten(0, 1), num_heads) for tensor in (queries, keys, values)), strict=True
    )
    gathered = [
        # Scaling inside the product spares a pass over the scores.
        torch.baddbmm(ignored, q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1) @ v
        for q, k, v in blocks
    ]
    return torch.cat(gathered).view(shape)


def most_attended(attention: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """Phase 2 of HiRED: in each partition the ``counts`` patches that CLS attends to most (Eq. 2).

    Bool like ``attention`` ``[..., patches]``; ``counts`` ``[...]`` may not exceed the patches ``among``
    (bool, like ``attention``) which to choose. Of equals the first in raster order is kept.
    """
    order = attention.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(among).scatter(-1, order, first)
