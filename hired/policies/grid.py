"""Every g-th token: what the paper calls spatial dropping."""

from __future__ import annotations

from torch import Tensor

from hired.policies.policy import Candidates, Policy
from hired.policies.spacing import evenly_spaced


class EvenGrid(Policy):
    """Keeps every g-th real patch of each partition in raster order, with the g of the budget.

    Differs from the paper's, whose whole numbers g keep a half where two fifths were meant.
    """

    name = "grid"

    def select(self, candidates: Candidates) -> Tensor:
        return evenly_spaced(candidates.real, candidates.even_shares())
