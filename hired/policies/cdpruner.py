"""CDPruner: tokens that are relevant to the question and unlike each other (arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hired.errors import ConfigurationError
from hired.policies.policy import Candidates, Policy
from hired.policies.similarity import cosines

Relevance = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CdPruner(Policy):
    """Keeps the likeliest set under a determinantal point process with kernel r_i cos(i, j) r_j.

    ``relevance`` maps features ``[images, partitions, patches, d]`` to a score of each patch; as published
    minus the mean cosine of CLIP's patch projection with its text features, see ``against_text``. It is
    scaled to 0..1 over the image. Raises ConfigurationError without it: checkpoints of LLaVA hold no text
    tower, so a score against a question must come from elsewhere.
    """

    name: ClassVar[str] = "cdpruner"

    relevance: Relevance | None = None

    def __post_init__(self) -> None:
        if self.relevance is None:
            raise ConfigurationError(
                "the policy 'cdpruner' compares patches with a question by CLIP's text tower, which "
                "checkpoints of LLaVA do not hold; make it in Python, CdPruner(relevance=against_text(...)), "
                "or choose 'scope', which needs no text"
            )

    def select(self, candidates: Candidates) -> Tensor:
        assert self.relevance is not None
        features, among = candidates.features(), candidates.real.flatten(1)
        relevance = _scaled(self.relevance(features).float().flatten(1), among)
        kernel = relevance[:, :, None] * cosines(features.flatten(1, 2)) * relevance[:, None]
        keep = likeliest_set(kernel, candidates.num_tokens, among, candidates.max_tokens)
        return keep.view_as(candidates.real)


def against_text(project: Callable[[Tensor], Tensor], text_features: Tensor) -> Relevance:
    """Minus the mean cosine of ``project(features)`` ``[..., d]`` with ``text_features`` ``[texts, d]``.

    ``project`` is CLIP's last norm and visual projection. The minus is the paper's: patch projections of CLIP
    lie away from what they show.
    """

    def relevance(features: Tensor) -> Tensor:
        patches = torch.nn.functional.normalize(project(features).float(), dim=-1)
        texts = torch.nn.functional.normalize(text_features.float(), dim=-1)
        return -(patches @ texts.T).mean(-1)

    return relevance


def _scaled(scores: Tensor, among: Tensor) -> Tensor:
    """Each row of ``[n, tokens]`` stretched so that the smallest ``among`` becomes 0 and the largest 1."""
    low = scores.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=1e-6)).nan_to_num(0, 0, 0)


def likeliest_set(kernel: Tensor, counts: Tensor, among: Tensor, max_count: int) -> Tensor:
    """Greedy maximum of the determinant (Chen et al., arXiv 1709.05135): bool ``[n, tokens]``.

    ``counts`` ``[n]`` of those ``among`` which to choose; ``kernel`` ``[n, tokens, tokens]``; ``max_count``
    is the largest of the counts. Where nothing adds volume any more the first in raster order are kept.
    """
    num_tokens = kernel.shape[-1]
    gain = kernel.diagonal(dim1=-2, dim2=-1).clone()
    factors = kernel.new_zeros(len(kernel), max_count, num_tokens)
    keep = torch.zeros_like(among)
    for step in range(max_count):
        chosen = gain.masked_fill(keep | ~among, -torch.inf).argmax(-1, keepdim=True)
        of_chosen = factors[:, :step].gather(-1, chosen[:, None].expand(-1, step, -1))
        row = kernel.gather(1, chosen[..., None].expand(-1, -1, num_tokens))[:, 0]
        left = row - (of_chosen * factors[:, :step]).sum(1)
        factor = left / gain.gather(-1, chosen).clamp(min=1e-12).sqrt()
        factors[:, step] = factor
        gain = (gain - factor.square()).clamp(min=0)
        keep = keep.scatter(-1, chosen, keep.gather(-1, chosen) | (step < counts)[:, None])
    return keep
