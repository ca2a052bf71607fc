"""The next token of every sequence, chosen on the device.

A draw needs one uniform number, which follows from the request's seed and the token's place in the answer
alone. So an answer does not depend on its neighbours in the batch, nor on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hired.engine import Sampling


def choose(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """Token ids int64 ``[m]`` from float32 logits ``[m, vocabulary]``; -1 where a score is not a number.

    ``steps`` are the places of these tokens in their answers.
    """
    chosen = logits.argmax(-1)
    if drawn := [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [samplings[row] for row in drawn], [steps[row] for row in drawn])
    return torch.where(logits.isnan().any(-1), -1, chosen)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step only (Philox, counter based)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def _draw(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751) by the inverse of the cumulative distribution."""
    columns = [
        [sampling.temperature for sampling in samplings],
        [sampling.top_p for sampling in samplings],
        [uniform(sampling.seed, step) for sampling, step in zip(samplings, steps, strict=True)],
    ]
    temperature, top_p, point = torch.tensor(columns, device=logits.device)[..., None]
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    nucleus = cumulative - probabilities < top_p  # what comes before has not reached top_p yet
    total = (probabilities * nucleus).sum(-1, keepdim=True)
    place = (cumulative <= point * total).sum(-1, keepdim=True)
    last = nucleus.sum(-1, keepdim=True) - 1
    chosen: Tensor = order.gather(-1, torch.minimum(place, last))[:, 0]
    return chosen
