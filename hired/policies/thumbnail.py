"""The full-image alone: what a small copy of the picture would tell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hired.budget import Budget
from hired.policies.policy import Candidates, Policy
from hired.policies.spacing import cell_centres


class Thumbnail(Policy):
    """Keeps patches of the full-image only, all of them or, under a smaller budget, spread evenly over it.

    A budget above the full-image's patches is not used up: there is nothing else in a thumbnail.
    """

    name = "thumbnail"

    def num_tokens(self, budget: Budget, real: Tensor) -> int:
        return min(super().num_tokens(budget, real), int(real[0].sum()))

    def select(self, candidates: Candidates) -> Tensor:
        full_image = candidates.real[:, 0]
        centres = cell_centres(full_image, candidates.num_tokens)
        keep = full_image & (centres == torch.arange(full_image.shape[-1], device=full_image.device))
        return pad(keep[:, None], (0, 0, 0, candidates.real.shape[1] - 1))
