"""What a token-dropping policy is, and what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.budget import Budget


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The patch tokens of a batch of images to choose from; tensors on the tower's device.

    Images with fewer partitions than the largest are filled up with absent ones. ``present`` and ``real`` are
    bool ``[images, partitions, patches]``; real patches are present and no padding. ``overlap``
    ``[images, partitions - 1, patches]`` is T_pi of Eq. 1. ``num_tokens`` int64 ``[images]`` may be kept.
    ``cls_attention`` holds, for the layers that the policy asked for, the attention of CLS summed over heads,
    float32 ``[images, partitions, patches]``. ``keys()`` and ``features()`` compute the feature layer's keys,
    heads joined, and its output, both ``[images, partitions, patches, d]``.
    """

    present: Tensor
    real: Tensor
    overlap: Tensor
    num_tokens: Tensor
    alpha: float
    feature_layer: int
    cls_attention: Mapping[int, Tensor]
    keys: Callable[[], Tensor]
    features: Callable[[], Tensor]


class Policy(ABC):
    """Chooses the visual tokens that reach the language model."""

    name: ClassVar[str]

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        """The layers whose CLS attention the policy reads; none above the feature layer."""
        return ()

    def num_tokens(self, budget: Budget, real: Tensor) -> int:
        """The most tokens that may remain of one image; ``real`` is its bool ``[partitions, patches]``.

        Known on the host beforehand, so that nothing waits for the device to know the size of the result.
        """
        return budget.num_tokens(int(real.sum()))

    @abstractmethod
    def select(self, candidates: Candidates) -> Tensor:
        """The patches to keep, bool ``[images, partitions, patches]``: real ones, at least one an image.

        Batched, on the device, and without waiting for it: no ``.item()``, no boolean indexing.
        """
