"""What a token-dropping policy is, what it sees, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hired.budget import Budget, integer_shares


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The patch tokens of a batch of images to choose from; tensors on the tower's device.

    Images with fewer partitions than the largest are filled up with absent ones. ``present`` and ``real`` are
    bool ``[images, partitions, patches]``; real patches are present and no padding. ``overlap``
    ``[images, partitions - 1, patches]`` is T_pi of Eq. 1. ``num_tokens`` int64 ``[images]`` may be kept.
    ``max_tokens`` is the largest of them and ``max_share`` the largest of ``even_shares``, or a little more:
    known on the host, for whoever chooses token by token.
    ``cls_attention`` holds, for the layers that the policy asked for, the attention of CLS summed over heads,
    float32 ``[images, partitions, patches]``. ``keys()`` and ``features()`` compute the feature layer's keys,
    heads joined, and its output, both ``[images, partitions, patches, d]``.
    ``single_head(0)`` computes what CLS would attend to if the feature layer had one head as wide as all,
    float32 ``[images, partitions, patches]``, and the keys; ``single_head(1)`` the same of the layer above.
    ``by_head(layer)`` tells the heads of ``cls_attention`` apart: float32 ``[images, partitions, patches,
    heads]``, of the layers that the policy asked for.
    ``fingerprints()`` are numbers made from the pixels of each image, the same in whatever company.
    """

    present: Tensor
    real: Tensor
    overlap: Tensor
    num_tokens: Tensor
    max_tokens: int
    max_share: int
    alpha: float
    feature_layer: int
    cls_attention: Mapping[int, Tensor]
    keys: Callable[[], Tensor]
    features: Callable[[], Tensor]
    single_head: Callable[[int], tuple[Tensor, Tensor]]
    by_head: Callable[[int], Tensor]
    fingerprints: Callable[[], Sequence[int]]

    @property
    def num_real(self) -> Tensor:
        """The real patches of each partition, int64 ``[images, partitions]``."""
        return self.real.sum(-1)

    def even_shares(self) -> Tensor:
        """The tokens of each partition if all keep the same rate, int64 ``[images, partitions]``."""
        return integer_shares(self.num_tokens, self.num_real, self.num_real)


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """Places that keep a token, and tokens that stand for more than the patch at their place.

    ``keep`` is bool ``[images, partitions, patches]``, ``features`` ``[images, partitions, patches, d]``;
    only those at kept places are read.
    """

    keep: Tensor
    features: Tensor

    @classmethod
    def of(cls, keep: Tensor, weights: Tensor, features: Tensor) -> Merged:
        """Tokens that are sums of their partition's: ``weights`` ``[..., patches, patches]``, to and from.

        Summed in float32, whatever the tower runs in.
        """
        return cls(keep, (weights.float() @ features.float()).to(features.dtype))


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
    def select(self, candidates: Candidates) -> Tensor | Merged:
        """The patches to keep, bool ``[images, partitions, patches]``: real ones, at least one an image.

        ``Merged`` where tokens are made of several. Batched, on the device, and without waiting for it: no
        ``.item()``, no boolean indexing.
        """
