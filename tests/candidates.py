"""What a policy sees of pictures that no tower has looked at: real geometry, numbers at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hired.budget import Budget
from hired.geometry import real_patches, sub_image_overlap
from hired.policies import Candidates, Merged, Policy
from hired.types import Grid, Size

FEATURE_LAYER = 3
SIDE_OF_PATCH = 8
WIDTH = 40


@dataclass(frozen=True)
class Picture:
    """A picture of that size on that grid; everything else follows from the seed."""

    original: Size
    grid: Grid
    seed: int = 0
    per_side: int = 4

    @cached_property
    def real(self) -> Tensor:
        return real_patches(self.original, self.grid, self.per_side)

    @cached_property
    def overlap(self) -> Tensor:
        return sub_image_overlap(self.original, self.grid, self.per_side, self.per_side * SIDE_OF_PATCH)

    def noise(self, number: int, *width: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        return torch.rand(*self.real.shape, *width, generator=generator)

    def attention(self, layer: int) -> Tensor:
        """What CLS attends to, ``[k + 1, patches]``: most of it at few patches."""
        return self.noise(layer) ** 6

    def by_head(self, layer: int) -> Tensor:
        """Two heads ``[k + 1, patches, 2]``, which differ and add up to ``attention``."""
        share = self.noise(30 + layer)
        return torch.stack([share, 1 - share], dim=-1) * self.attention(layer)[..., None]

    @cached_property
    def single_head(self) -> Tensor:
        return (4 * self.noise(20)).softmax(-1)

    @cached_property
    def keys(self) -> Tensor:
        return self.noise(21, WIDTH) - 0.3

    @cached_property
    def features(self) -> Tensor:
        return self.noise(22, WIDTH) - 0.3


def candidates(
    policy: Policy, pictures: Sequence[Picture], budget: Budget, *, device: str = "cpu"
) -> Candidates:
    """The pictures as one batch."""

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True).to(device)

    limits = [policy.num_tokens(budget, picture.real) for picture in pictures]
    num_patches = pictures[0].per_side ** 2
    return Candidates(
        present=stacked([torch.ones_like(picture.real) for picture in pictures]),
        real=stacked([picture.real for picture in pictures]),
        overlap=stacked([picture.overlap for picture in pictures]),
        num_tokens=torch.tensor(limits, device=device),
        max_tokens=max(limits),
        max_share=max(
            min(num_patches, -(-limit * num_patches // int(picture.real.sum())))
            for limit, picture in zip(limits, pictures, strict=True)
        ),
        alpha=budget.alpha,
        feature_layer=FEATURE_LAYER,
        cls_attention={
            layer: stacked([picture.attention(layer) for picture in pictures])
            for layer in policy.layers(FEATURE_LAYER)
        },
        keys=lambda: stacked([picture.keys for picture in pictures]),
        features=lambda: stacked([picture.features for picture in pictures]),
        single_head=lambda _: (
            stacked([picture.single_head for picture in pictures]),
            stacked([picture.keys for picture in pictures]),
        ),
        by_head=lambda layer: stacked([picture.by_head(layer) for picture in pictures]),
        fingerprints=lambda: [picture.seed for picture in pictures],
    )


def kept(policy: Policy, seen: Candidates) -> Tensor:
    """Where the policy keeps a token, bool ``[images, partitions, patches]``."""
    answer = policy.select(seen)
    return answer.keep if isinstance(answer, Merged) else answer


def patches_of(policy: Policy, picture: Picture, budget: Budget) -> list[list[int]]:
    """The patches that the policy keeps of each partition of one picture."""
    keep = kept(policy, candidates(policy, [picture], budget))[0]
    return [partition.nonzero()[:, 0].tolist() for partition in keep]


def real_of(picture: Picture) -> list[list[int]]:
    """The real patches of each partition."""
    return [partition.nonzero()[:, 0].tolist() for partition in picture.real]


def naive_even_shares(picture: Picture, num_tokens: int) -> list[int]:
    """The tokens of each partition in proportion to its patches, by largest remainder in exact fractions."""
    sizes = [len(patches) for patches in real_of(picture)]
    quotas = [Fraction(num_tokens * size, sum(sizes)) for size in sizes]
    shares = [int(quota) for quota in quotas]
    order = sorted(range(len(sizes)), key=lambda i: (shares[i] - quotas[i], -sizes[i], i))
    for i in order[: num_tokens - sum(shares)]:
        shares[i] += 1
    return shares


def naive_cosine(one: Tensor, other: Tensor) -> float:
    products = sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))
    lengths = [sum(a * a for a in vector.tolist()) ** 0.5 for vector in (one, other)]
    return float(products / (lengths[0] * lengths[1]))


def pictures(per_side: int = 4) -> st.SearchStrategy[Picture]:
    """Square, wide, tall, thin; with padding and without; some sub-images all padding."""
    return st.builds(
        Picture,
        original=st.builds(Size, st.integers(1, 400), st.integers(1, 400)),
        grid=st.builds(Grid, st.integers(1, 3), st.integers(1, 3)),
        seed=st.integers(0, 1000),
        per_side=st.just(per_side),
    )


# No padding; a band of padding in every sub-image; sub-images of padding alone; an odd number of columns.
EXAMPLES = [
    Picture(Size(64, 64), Grid(2, 2), seed=1),
    Picture(Size(60, 200), Grid(2, 2), seed=2),
    Picture(Size(20, 300), Grid(3, 3), seed=3),
    Picture(Size(97, 41), Grid(1, 2), seed=4, per_side=5),
]

budgets = st.one_of(
    st.builds(lambda rate, alpha: Budget(rate=rate, alpha=alpha), st.floats(0.001, 1), st.floats(0, 1)),
    st.builds(lambda tokens: Budget(tokens=tokens), st.integers(1, 200)),
)
