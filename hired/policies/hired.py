"""HiRED: attention-guided token dropping under a fixed budget (Arif et al., AAAI 2025, arXiv 2408.10945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.attention import most_attended
from hired.budget import allocate, visual_content_scores
from hired.policies.policy import Candidates, Merged, Policy


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

    def allocate(self, candidates: Candidates) -> Tensor:
        """Phase 1: the tokens of each partition, int64 ``[images, partitions]``."""
        initial = candidates.cls_attention[self.layers(candidates.feature_layer)[0]]
        scores = visual_content_scores(initial[:, 0], candidates.overlap)
        return allocate(candidates.num_tokens, scores, candidates.num_real, candidates.alpha)

    def select(self, candidates: Candidates) -> Tensor | Merged:
        final = candidates.cls_attention[self.layers(candidates.feature_layer)[1]]
        return most_attended(final, self.allocate(candidates), among=candidates.real)
