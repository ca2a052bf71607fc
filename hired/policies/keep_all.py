"""Every token: what the model does without dropping, whatever the budget says."""

from __future__ import annotations

from torch import Tensor

from hired.budget import Budget
from hired.policies.policy import Candidates, Policy


class KeepAll(Policy):
    """Keeps all real patches."""

    name = "keep-all"

    def num_tokens(self, budget: Budget, real: Tensor) -> int:
        return int(real.sum())

    def select(self, candidates: Candidates) -> Tensor:
        return candidates.real
