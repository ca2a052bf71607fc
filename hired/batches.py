"""Images whose partitions go through the tower together, whatever their grids; nothing here computes.

A batch is bounded by partitions, because every partition costs the tower the same and an image does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hired.devices import sent
from hired.errors import ConfigurationError
from hired.geometry import Tiling, real_patches, sub_image_overlap
from hired.policies import Candidates
from hired.types import Partitions

# Filling up to one of eight sizes wastes a sixteenth of a large batch on average.
NUM_SIZES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Neighbouring images and the tensors that lay out their partitions.

    ``pixels`` uint8 ``[n, side, side, 3]`` are those of all partitions, one image after the other, and then
    of blank ones that belong to none; ``row`` int64 ``[images, partitions]`` says where among them a
    partition of an image lies. For the other tensors see ``Candidates``.
    """

    images: tuple[Partitions, ...]
    pixels: Tensor
    row: Tensor
    present: Tensor
    real: Tensor
    overlap: Tensor

    @classmethod
    def of(cls, images: Sequence[Partitions], tiling: Tiling, size: int | None = None) -> Batch:
        """The images on the host, filled up to ``size`` partitions if it is given."""
        per_side, side = tiling.patches_per_side, tiling.side
        num_partitions = [image.grid.num_partitions for image in images]
        rows = torch.split(torch.arange(sum(num_partitions)), num_partitions)
        real = [real_patches(image.original_size, image.grid, per_side) for image in images]
        overlap = [sub_image_overlap(image.original_size, image.grid, per_side, side) for image in images]
        num_blank = (size or sum(num_partitions)) - sum(num_partitions)
        blank = np.zeros((num_blank, side, side, 3), np.uint8)
        return cls(
            images=tuple(images),
            pixels=torch.from_numpy(np.concatenate([*(image.pixels for image in images), blank])),
            row=pad_sequence(list(rows), batch_first=True),
            present=pad_sequence([torch.ones_like(mask) for mask in real], batch_first=True),
            real=pad_sequence(real, batch_first=True),
            overlap=pad_sequence(overlap, batch_first=True),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with other tensors, such as copies on a device."""
        return Batch(
            images=self.images,
            pixels=function(self.pixels),
            row=function(self.row),
            present=function(self.present),
            real=function(self.real),
            overlap=function(self.overlap),
        )

    @property
    def num_partitions(self) -> list[int]:
        return [image.grid.num_partitions for image in self.images]

    @property
    def num_before(self) -> list[int]:
        """The real tokens of each image."""
        counts: list[int] = self.real.sum((1, 2)).tolist()
        return counts

    @property
    def real_by_image(self) -> list[Tensor]:
        """Bool ``[k + 1, patches]`` of each image, without absent partitions."""
        return [real[:num] for real, num in zip(self.real, self.num_partitions, strict=True)]

    def fingerprints(self) -> list[int]:
        """64 bits made from the pixels of each image."""
        return [
            int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image.pixels).data, digest_size=8).digest())
            for image in self.images
        ]

    def candidates(
        self,
        limits: Sequence[int],
        num_before: Sequence[int],
        alpha: float,
        feature_layer: int,
        from_cls: Mapping[int, Tensor],
        keys: Callable[[], Tensor],
        features: Callable[[], Tensor],
        single_head: Callable[[int], tuple[Tensor, Tensor]],
        by_head: Callable[[int], Tensor],
    ) -> Candidates:
        """What a policy chooses from; ``from_cls``, ``keys`` and ``features`` are ``[n, patches, ...]``.

        ``by_head`` gives ``[n, heads, patches]`` of a layer.
        ``limits`` are the tokens that may be kept of each image, ``num_before`` those that there are.
        """

        def by_image(values: Tensor) -> Tensor:
            """From ``[n, patches, ...]`` of all partitions to ``[images, partitions, patches, ...]``."""
            absent = ~self.present.reshape(self.present.shape + (1,) * (values.ndim - 2))
            return values[self.row].masked_fill(absent, 0)

        def both(layers_above: int) -> tuple[Tensor, Tensor]:
            attention, own_keys = single_head(layers_above)
            return by_image(attention), by_image(own_keys)

        num_patches = self.real.shape[-1]
        return Candidates(
            present=self.present,
            real=self.real,
            overlap=self.overlap,
            num_tokens=sent(torch.tensor(limits), self.real.device),
            max_tokens=max(limits),
            max_share=max(
                min(num_patches, -(-limit * num_patches // before))
                for limit, before in zip(limits, num_before, strict=True)
            ),
            alpha=alpha,
            feature_layer=feature_layer,
            cls_attention={layer: by_image(attention) for layer, attention in from_cls.items()},
            keys=lambda: by_image(keys()),
            features=lambda: by_image(features()),
            single_head=both,
            by_head=lambda layer: by_image(by_head(layer).transpose(1, 2)),
            fingerprints=self.fingerprints,
        )


def batches(
    images: Sequence[Partitions], tiling: Tiling, max_partitions: int, sizes: Collection[int] = ()
) -> Iterator[Batch]:
    """Neighbouring images, as many as ``max_partitions`` allows and at least one.

    A batch is filled up with blank partitions to the next of the ``sizes`` where that costs no more than an
    eighth. Raises ConfigurationError for partitions that were cut for another tower.
    """
    batch: list[Partitions] = []
    num_partitions = 0
    for image in images:
        if image.side != tiling.side:
            raise ConfigurationError(
                f"partitions of {image.side} px do not fit a tower for {tiling.side} px; cut images "
                "with the tiling of the model that encodes them"
            )
        if batch and num_partitions + image.grid.num_partitions > max_partitions:
            yield Batch.of(batch, tiling, filled_up(num_partitions, sizes))
            batch, num_partitions = [], 0
        batch.append(image)
        num_partitions += image.grid.num_partitions
    if batch:
        yield Batch.of(batch, tiling, filled_up(num_partitions, sizes))


def few_sizes(max_partitions: int) -> tuple[int, ...]:
    """The sizes, evenly spaced and at most eight, that batches are filled up to, so that shapes are few."""
    step = -(-max_partitions // NUM_SIZES)
    return tuple(range(max_partitions, 0, -step))[::-1]


def filled_up(num_partitions: int, sizes: Collection[int]) -> int:
    """The next of the ``sizes`` where it is at most an eighth more, else the number itself."""
    size = min((size for size in sizes if size >= num_partitions), default=num_partitions)
    return size if size - num_partitions <= num_partitions // 8 else num_partitions
