"""HiRED's allocation with SCOPE's selection: where to look by content, what to keep there by coverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.policies.hired import Hired
from hired.policies.policy import Candidates
from hired.policies.scope import covering


@dataclass(frozen=True)
class HiredScope(Hired):
    """Shares the budget out as HiRED does, and spends it in each partition as SCOPE does.

    ``power`` is the exponent of the attention that selects.
    """

    name: ClassVar[str] = "hired-scope"

    power: float = 1.0

    def select(self, candidates: Candidates) -> Tensor:
        worth = candidates.cls_attention[self.layers(candidates.feature_layer)[1]] ** self.power
        max_count = min(candidates.max_tokens, candidates.real.shape[-1])
        return covering(candidates.features(), worth, self.allocate(candidates), candidates.real, max_count)
