"""PruMerge+: PruMerge's patches and others spread evenly (LLaVA-PruMerge, arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.attention import most_attended
from hired.policies.prumerge import PruMerge
from hired.policies.spacing import evenly_spaced


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """A quarter of each partition's tokens, or one at least, by attention; the others at even steps.

    In the published code the step is int(1 / ratio) / 3 where ``ratio`` of all patches were kept by
    attention, so three even ones come to each of those. There the two sets may meet; here they do not, so
    that the count is exact. Merging is PruMerge's.
    """

    name: ClassVar[str] = "prumerge+"

    def kept(self, attention: Tensor, counts: Tensor, real: Tensor) -> Tensor:
        num_attended = (counts + 3) // 4
        attended = most_attended(attention, num_attended, among=real)
        return attended | evenly_spaced(real & ~attended, counts - num_attended)
