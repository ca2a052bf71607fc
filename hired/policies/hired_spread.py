"""What CLS attends to, and nothing twice: attention weighs how far a token lies from those kept.

HiRED keeps what CLS attends to, although it may be the same thing again: ten patches of one plate. DivPrune
keeps what is unlike all that is kept, although nothing may be there: the corners of a background. Here the
product of both decides, over the whole image, with no quotas for partitions: what the full-image and a
sub-image show alike is then kept once. Ours; found on drawn scenes (docs/results/accuracy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hired.policies.policy import Candidates, Policy
from hired.policies.similarity import cosines


@dataclass(frozen=True)
class HiredSpread(Policy):
    """Keeps, one after the other, the token with the largest ``attention ** power`` times distance.

    Attention is that of CLS in the feature layer, as a share of its partition's; the distance is 1 less the
    largest cosine with a token kept before. The first is the most attended. ``alpha`` plays no part.
    """

    name: ClassVar[str] = "hired-spread"

    power: float = 0.5

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return (feature_layer,)

    def select(self, candidates: Candidates) -> Tensor:
        attention = candidates.cls_attention[candidates.feature_layer].masked_fill(~candidates.real, 0)
        share = attention / attention.sum(-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
        keep = spread_out(
            cosines(candidates.features().flatten(1, 2)),
            share.flatten(1).nan_to_num(0, 0, 0) ** self.power,
            candidates.num_tokens,
            candidates.real.flatten(1),
            candidates.max_tokens,
        )
        return keep.view_as(candidates.real)


def spread_out(alike: Tensor, weight: Tensor, counts: Tensor, among: Tensor, max_count: int) -> Tensor:
    """Greedy maximum of weight times distance to the nearest that is kept: bool ``[n, tokens]``.

    ``counts`` ``[n]`` of those ``among`` which to choose; ``alike`` ``[n, tokens, tokens]`` is 1 less the
    distance; ``weight`` ``[n, tokens]`` is not negative; ``max_count`` is the largest of the counts.
    """
    distance = torch.ones_like(weight)
    keep = torch.zeros_like(among)
    for step in range(max_count):
        gain = (weight * distance).masked_fill(keep | ~among, -torch.inf)
        chosen = gain.argmax(-1, keepdim=True)
        to_chosen = 1 - alike.gather(1, chosen[..., None].expand(-1, -1, alike.shape[-1]))[:, 0]
        distance = to_chosen.clamp(min=0) if step == 0 else distance.minimum(to_chosen).clamp(min=0)
        keep = keep.scatter(-1, chosen, keep.gather(-1, chosen) | (step < counts)[:, None])
    return keep
