"""Tokens at random: the control that every policy must beat (UniPruneBench, arXiv 2511.02650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hired.attention import most_attended
from hired.devices import sent
from hired.policies.policy import Candidates, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Keeps real patches drawn uniformly and without replacement from the whole image.

    The draw follows from ``seed``, 0 or more, and the picture's pixels: the same picture keeps the same
    patches on every device and in every batch, and two pictures keep different ones.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def select(self, candidates: Candidates) -> Tensor:
        real = candidates.real
        # On the host, because devices draw differently. Numbers are drawn one after the other, so absent
        # partitions, which come last, change nothing.
        lots = [
            np.random.default_rng([self.seed, fingerprint]).random(real.shape[1:])
            for fingerprint in candidates.fingerprints()
        ]
        drawn = sent(torch.from_numpy(np.stack(lots)), real.device)
        return most_attended(drawn.flatten(1), candidates.num_tokens, among=real.flatten(1)).view_as(real)
