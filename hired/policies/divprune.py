"""DivPrune: tokens as unlike each other as can be (Alvar et al., CVPR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from hired.policies.policy import Candidates, Policy
from hired.policies.similarity import cosines


class DivPrune(Policy):
    """Keeps, one after the other, the token of the image that is farthest from all kept so far, by cosine.

    The first is the one farthest from its nearest.
    """

    name = "divprune"

    def select(self, candidates: Candidates) -> Tensor:
        alike = cosines(candidates.features().flatten(1, 2))
        among = candidates.real.flatten(1)
        keep = farthest_apart(alike, candidates.num_tokens, among, candidates.max_tokens)
        return keep.view_as(candidates.real)


def farthest_apart(alike: Tensor, counts: Tensor, among: Tensor, max_count: int) -> Tensor:
    """Greedy max-min: bool ``[n, tokens]``, ``counts`` ``[n]`` of those ``among`` which to choose.

    ``alike`` ``[n, tokens, tokens]`` is 1 less the distance; ``max_count`` the largest of the counts.
    """
    itself = torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
    nearest = alike.masked_fill(itself | ~among[:, None], -torch.inf).amax(-1)
    keep = torch.zeros_like(among)
    for step in range(max_count):
        chosen = nearest.masked_fill(keep | ~among, torch.inf).argmin(-1, keepdim=True)
        to_chosen = alike.gather(1, chosen[..., None].expand(-1, -1, alike.shape[-1]))[:, 0]
        nearest = nearest.maximum(to_chosen) if step else to_chosen
        keep = keep.scatter(-1, chosen, keep.gather(-1, chosen) | (step < counts)[:, None])
    return keep
