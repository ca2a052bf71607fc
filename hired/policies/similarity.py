"""How alike tokens are."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def cosines(vectors: Tensor) -> Tensor:
    """The cosine of each two of ``[..., n, d]``, float32 ``[..., n, n]``.

    A vector with a component that is no finite number is like none: half-precision towers overflow, and
    the count of tokens must not depend on it.
    """
    unit = normalize(vectors.float(), dim=-1).nan_to_num(0, 0, 0)
    return unit @ unit.transpose(-1, -2)
