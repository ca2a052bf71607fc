"""VisionZip: dominant tokens, and context tokens that take in the others (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hired.attention import most_attended
from hired.policies.policy import Candidates, Merged, Policy
from hired.policies.similarity import cosines
from hired.policies.spacing import evenly_spaced

# The paper's 54 dominant and 10 context tokens of 64.
CONTEXT_OF_64 = 10


@dataclass(frozen=True)
class VisionZip(Policy):
    """Keeps what CLS attends to most, as it is, and of the rest ``context_of_64`` / 64 at even steps.

    Every other token joins the context token of highest key cosine, which becomes itself plus the mean of
    those that joined. All partitions keep the same rate.
    """

    name: ClassVar[str] = "visionzip"

    context_of_64: int = CONTEXT_OF_64

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return (feature_layer,)

    def select(self, candidates: Candidates) -> Merged:
        real, counts = candidates.real, candidates.even_shares()
        num_context = (counts * self.context_of_64 + 32) // 64
        attention = candidates.cls_attention[candidates.feature_layer]
        dominant = most_attended(attention, counts - num_context, among=real)
        context = evenly_spaced(real & ~dominant, num_context)
        others = real & ~dominant & ~context

        to_context = cosines(candidates.keys()).masked_fill(~context[..., None, :], -torch.inf)
        patches = torch.arange(real.shape[-1], device=real.device)
        joined = (to_context.argmax(-1)[..., None, :] == patches[:, None]) & others[..., None, :]
        joined &= context[..., None]  # where no context token is, nobody joins
        mean = joined / joined.sum(-1, keepdim=True).clamp(min=1)
        itself = torch.eye(real.shape[-1], device=real.device)
        return Merged.of(dominant | context, itself + mean, candidates.features())
