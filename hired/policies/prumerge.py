"""PruMerge: what CLS attends to, with what is like it merged in (LLaVA-PruMerge, arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hired.attention import most_attended
from hired.budget import integer_shares
from hired.policies.policy import Candidates, Merged, Policy
from hired.policies.similarity import cosines


@dataclass(frozen=True)
class PruMerge(Policy):
    """Keeps the patches that CLS attends to most; each takes in its nearest by key, the last one the rest.

    CLS attends with one head as wide as all, in the layer ``layers_above`` the feature layer: 1 as published,
    0 for a tower whose last layer was never trained or is not there. A kept token i becomes x_i + sum of
    a_j x_j over its ``num_nearest``; one token of each partition is the sum of a_j x_j over what is dropped,
    and stands where the most attended of it was. Partitions that keep all or one have no such token.

    Differs from the published code, whose number of tokens follows from the picture: here it is the budget's,
    and partitions share it by how many patches are attended to above Q3 + 1.5 interquartile ranges. At a
    budget of that many these very patches are kept. Order is raster, theirs that of attention.
    """

    name: ClassVar[str] = "prumerge"

    layers_above: int = 1
    num_nearest: int = 32

    def select(self, candidates: Candidates) -> Merged:
        real, num_real = candidates.real, candidates.num_real
        attention, keys = candidates.single_head(self.layers_above)
        counts = integer_shares(candidates.num_tokens, num_outliers(attention, real), num_real)
        keep = self.kept(attention, counts, real)

        has_rest = (counts > 1) & (counts < num_real)
        core = most_attended(attention, counts - has_rest.long(), among=keep)
        rest = real & ~core & has_rest[..., None]

        itself = torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)
        num_nearest = (num_real - 1).clamp(0, self.num_nearest)[..., None].expand(real.shape)
        nearest = most_attended(cosines(keys), num_nearest, among=real[..., None, :] & ~itself)
        into_core = (itself + nearest * attention[..., None, :]) * core[..., None]
        into_rest = (keep & ~core)[..., None] * (attention * rest)[..., None, :]
        return Merged.of(keep, into_core + into_rest, candidates.features())

    def kept(self, attention: Tensor, counts: Tensor, real: Tensor) -> Tensor:
        """The places of tokens, ``counts`` ``[...]`` of each partition's ``real`` ``[..., patches]``."""
        return most_attended(attention, counts, among=real)


def num_outliers(attention: Tensor, real: Tensor) -> Tensor:
    """How many of each partition's real patches lie above Q3 + 1.5 (Q3 - Q1), int64 ``[...]``."""
    ordered = attention.masked_fill(~real, torch.inf).sort(dim=-1).values
    last = (real.sum(-1, keepdim=True) - 1).clamp(min=0)

    def quantile(share: float) -> Tensor:
        """Between neighbours in proportion, as numpy's percentiles are."""
        place = last * share
        low, high = place.floor().long(), place.ceil().long()
        return torch.lerp(ordered.gather(-1, low), ordered.gather(-1, high), (place - low).to(ordered.dtype))

    first, third = quantile(0.25), quantile(0.75)
    return ((attention > third + 1.5 * (third - first)) & real).sum(-1)
