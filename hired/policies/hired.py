"""HiRED: attention-guided token dropping under a fixed budget (Arif et al., AAAI 2025, arXiv 2408.10945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.attention import most_attended
from hired.budget import allocate, visual_content_scores
from hired.policies.policy import Candidates, Policy


@dataclass(frozen=True)
class Hired(Policy):
    """Shares the budget out by what CLS attends to early in the full-image, and spends it in each partition
    on the patches that CLS attends to late.

    ``initial_layer`` allocates (Eq. 1), ``final_layer`` selects (Eq. 2); by default the feature layer.
    """

    name: ClassVar[str] = "hired"

    initial_layer: int = 0
    final_layer: int | None = None

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return self.initial_layer, feature_layer if self.final_layer is None else self.final_layer

    def select(self, candidates: Candidates) -> Tensor:
        initial, final = (candidates.cls_attention[i] for i in self.layers(candidates.feature_layer))
        scores = visual_content_scores(initial[:, 0], candidates.overlap)
        num_real = candidates.real.sum(-1)
        counts = allocate(candidates.num_tokens, scores, num_real, candidates.alpha)
        return most_attended(final, counts, among=candidates.real)
