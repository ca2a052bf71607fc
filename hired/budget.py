"""The token budget and its allocation: phase 1 of HiRED (Arif et al., arXiv 2408.10945).

Everything is batched, ``[num_images, ...]``, in integers and float64, and never waits for the device: a
budget and the counts of real tokens are known beforehand, only the scores are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hired.errors import ConfigurationError

# 0.29 * 100 is 28.999999999999996: floors must not fall below an integer that was meant.
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """How many visual tokens of an image remain: a share of it (``rate``) or a number (``tokens``).

    ``alpha`` is the full-image's share of the budget. Raises ConfigurationError for values out of range.
    """

    rate: float | None = None
    tokens: int | None = None
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.tokens is None):
            raise ConfigurationError(
                f"a budget is either a rate or a number of tokens, got rate={self.rate!r} and "
                f"tokens={self.tokens!r}; give exactly one"
            )
        if self.rate is not None and not (_is_number(self.rate) and 0 < self.rate <= 1):
            raise ConfigurationError(
                f"rate={self.rate!r} is no share of the tokens; give more than 0 and at most 1, e.g. rate=0.2"
            )
        if self.tokens is not None and not (type(self.tokens) is int and self.tokens >= 1):
            raise ConfigurationError(
                f"tokens={self.tokens!r} is no number of tokens; give an integer from 1, e.g. tokens=576"
            )
        if not (_is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise ConfigurationError(
                f"alpha={self.alpha!r} is no share of the budget; give a number from 0 (nothing for the "
                "full-image) to 1 (all of it)"
            )

    def num_tokens(self, num_before: int) -> int:
        """The tokens that remain of ``num_before``: at least one, and never more than there are."""
        if self.tokens is not None:
            return min(self.tokens, num_before)
        assert self.rate is not None  # one of the two is given
        return min(max(1, math.floor(self.rate * num_before + _EPSILON)), num_before)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def visual_content_scores(full_image_attention: Tensor, overlap: Tensor) -> Tensor:
    """Eq. 1: each sub-image's share of what CLS attends to in the full-image, float64 ``[num_images, k]``.

    ``full_image_attention`` ``[num_images, patches]`` is summed over heads; ``overlap``
    ``[num_images, k, patches]`` is T_pi, with fractions where a patch lies across several sub-images.
    """
    return torch.einsum("nkp,np->nk", overlap.double(), full_image_attention.double())


def allocate(num_tokens: Tensor, scores: Tensor, num_real: Tensor, alpha: float) -> Tensor:
    """Phase 1: the tokens of each partition, int64 ``[num_images, k + 1]``, the full-image's first.

    ``num_tokens`` ``[num_images]`` is used exactly. The full-image gets floor(alpha * N); the sub-images
    share the rest by their visual content ``scores`` ``[num_images, k]``. No partition gets more than its
    ``num_real`` ``[num_images, k + 1]`` tokens; what a sub-image has no room for goes to the others, what
    they have no room for to the full-image, and what that has no room for to the sub-images.
    Differs from the paper, whose floors use up less than the budget and whose counts include padding.
    """
    room_in_sub_images = num_real[:, 1:].sum(-1)
    full_image = (num_tokens.double() * alpha + _EPSILON).floor().long()
    full_image = full_image.minimum(num_real[:, 0]).maximum(num_tokens - room_in_sub_images)
    sub_images = integer_shares(num_tokens - full_image, scores, num_real[:, 1:])
    return torch.cat([full_image[:, None], sub_images], dim=-1)


def integer_shares(totals: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """``totals`` ``[n]`` divided in proportion to ``weights`` ``[n, m]`` into int64 ``[n, m]``.

    Each row sums to its total, or to the sum of its ``caps`` ``[n, m]`` if that is less; no part exceeds its
    cap. Parts without weight get what the others have no room for, in proportion to their caps. Of two parts
    with equal caps the heavier never gets less.
    """
    shares = _weighted_shares(totals, weights, caps)
    room = caps - shares
    return shares + _weighted_shares(totals - shares.sum(-1), room, room)


def _weighted_shares(totals: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """As ``integer_shares``, but parts without weight get nothing, whatever is left over."""
    # A picture that overflowed a half-precision tower has no scores; it must not upset the count of tokens.
    weights = weights.double().nan_to_num(0, 0, 0).clamp(min=0)
    caps = caps * (weights > 0)
    totals = totals.minimum(caps.sum(-1))
    quotas = _capped_quotas(totals, weights, caps)
    shares = quotas.floor()

    # Largest remainder; of equal remainders the heaviest part, then the first: both sorts are stable. Nine
    # decimals, because the last bits of equal remainders differ with the size of the quota and the device.
    remainders = (quotas - shares).round(decimals=9)
    by_weight = weights.argsort(dim=-1, descending=True, stable=True)
    by_remainder = remainders.gather(-1, by_weight).argsort(dim=-1, descending=True, stable=True)
    rank = by_weight.gather(-1, by_remainder).argsort(dim=-1)
    missing = totals - shares.sum(-1)
    return (shares + (rank < missing[:, None])).long()


def _capped_quotas(totals: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """min(caps, level * weights) ``[n, m]``, with the level at which each row sums to its total.

    Parts fill up in the order of caps / weights. Suppose that the first t are full and the others share what
    those leave: with t their level rises as long as one more overflows, and falls from there on. So the
    highest is the one, and no rounds are needed.
    """
    order = torch.where(weights > 0, caps / weights, 0).argsort(dim=-1)
    caps_in_order, weights_in_order = caps.gather(-1, order), weights.gather(-1, order)
    left = totals[:, None] - (caps_in_order.cumsum(-1) - caps_in_order)
    levels = left / weights_in_order.flip(-1).cumsum(-1).flip(-1)
    return (weights * levels.nan_to_num(0).amax(-1, keepdim=True)).minimum(caps)
