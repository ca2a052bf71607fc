"""SCOPE: tokens that CLS attends to and that cover what the kept ones do not (kinredon/SCOPE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hired.policies.policy import Candidates, Policy
from hired.policies.similarity import cosines


@dataclass(frozen=True)
class Scope(Policy):
    """Keeps in each partition, one after the other, the token of highest gain in coverage times attention.

    ``power`` is the exponent of attention, the paper's alpha. All partitions keep the same rate.
    """

    name: ClassVar[str] = "scope"

    power: float = 1.0

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return (feature_layer,)

    def select(self, candidates: Candidates) -> Tensor:
        worth = candidates.cls_attention[candidates.feature_layer] ** self.power
        counts = candidates.even_shares()
        return covering(candidates.features(), worth, counts, candidates.real, candidates.max_share)


def covering(features: Tensor, worth: Tensor, counts: Tensor, among: Tensor, max_count: int) -> Tensor:
    """Greedy argmax over j of sum over i of max(0, cos(i, j) - c_i), times ``worth`` of j.

    c_i is the largest cosine of i to what is kept, 0 to begin with. Bool ``[..., patches]``: ``counts``
    ``[...]`` of the patches ``among`` which to choose, which are also those to cover; ``max_count`` is no
    less than any of the counts.
    """
    flat = among.flatten(0, -2)
    alike = cosines(features).flatten(0, -3) * flat[..., None]  # rows: what is to be covered
    worth, counts = worth.flatten(0, -2), counts.flatten()
    covered, keep = torch.zeros_like(worth), torch.zeros_like(flat)
    for step in range(max_count):
        gain = torch.relu(alike - covered[..., None]).sum(-2) * worth
        chosen = gain.nan_to_num(0).masked_fill(keep | ~flat, -1).argmax(-1, keepdim=True)
        to_chosen = alike.gather(-1, chosen[..., None].expand(-1, alike.shape[-2], -1))[..., 0]
        covered = covered.maximum(to_chosen)
        keep = keep.scatter(-1, chosen, keep.gather(-1, chosen) | (step < counts)[:, None])
    return keep.view_as(among)
