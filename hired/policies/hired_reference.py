"""HiRED as its published code computes it (hasanar1f/HiRED), for comparison with the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from hired.attention import most_attended
from hired.budget import Budget
from hired.policies.policy import Candidates, Policy


class HiredReference(Policy):
    """The allocation of the published code, which differs from the paper in four ways.

    Sub-images are taken for bands of full-image patch rows, one after the other, instead of the places where
    they lie. A band's weight is how many of the int(patches * (1 - alpha)) most attended full-image patches
    fall into it, not their attention. What floors and limits leave over is given to nobody. The budget
    counts all patches, padding included, and padding is chosen like anything else, then cut off. So fewer
    tokens than the budget may remain; here at least one does, the one most attended in the full-image.
    """

    name = "hired-reference"

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return 0, feature_layer

    def num_tokens(self, budget: Budget, real: Tensor) -> int:
        return budget.num_tokens(real.numel())

    def select(self, candidates: Candidates) -> Tensor:
        initial, final = (candidates.cls_attention[i] for i in self.layers(candidates.feature_layer))
        counts = self._allocate(candidates, initial[:, 0])
        chosen = most_attended(final, counts, among=candidates.present) & candidates.real
        nothing_left = ~chosen.flatten(1).any(-1)
        chosen[:, 0] |= most_attended(final[:, 0], nothing_left, among=candidates.real[:, 0])
        return chosen

    def _allocate(self, candidates: Candidates, full_image_attention: Tensor) -> Tensor:
        """The tokens of each partition, int64 ``[images, partitions]``."""
        present, num_tokens, alpha = candidates.present, candidates.num_tokens, candidates.alpha
        num_images, num_partitions, num_patches = present.shape
        full_image = (num_tokens.double() * alpha).long().clamp(max=num_patches)

        num_top = num_tokens.new_full([num_images], int(num_patches * (1 - alpha)))
        top = most_attended(full_image_attention, num_top, among=present[:, 0])
        num_bands = present[:, 1:, 0].sum(-1, keepdim=True)
        band = torch.arange(num_patches, device=top.device) * num_bands // num_patches
        in_band = num_tokens.new_zeros(num_images, num_partitions - 1).scatter_add(-1, band, top.long())

        shares = in_band * (num_tokens - full_image)[:, None] // in_band.sum(-1, keepdim=True).clamp(min=1)
        return torch.cat([full_image[:, None], shares.clamp(max=num_patches)], dim=-1)
