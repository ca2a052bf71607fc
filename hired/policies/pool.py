"""Average pooling of neighbouring tokens."""

from __future__ import annotations

import torch

from hired.policies.policy import Candidates, Merged, Policy
from hired.policies.spacing import cell_centres


class Pool(Policy):
    """Cuts each partition's real patches into cells, g x g of the budget's g, and keeps the mean of each.

    A mean stands where the middle patch of its cell was.
    """

    name = "pool"

    def select(self, candidates: Candidates) -> Merged:
        real, counts = candidates.real, candidates.even_shares()
        centres = cell_centres(real, counts)
        patches = torch.arange(real.shape[-1], device=real.device)
        in_cell = (centres[..., None, :] == patches[:, None]) & real[..., None, :]
        size = in_cell.sum(-1, keepdim=True)
        keep = real & (centres == patches) & (counts[..., None] > 0)
        return Merged.of(keep, in_cell / size.clamp(min=1), candidates.features())
