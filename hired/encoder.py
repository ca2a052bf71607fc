"""``Partitions`` -> ``VisualTokens``: the half of the model that sees.

Images of different grids share batches. Every choice is made inside one image, so its tokens are the same
alone and in company. Nothing waits for the device until the results are copied to the host, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hired import policies
from hired.budget import Budget
from hired.errors import ConfigurationError, ModelError
from hired.geometry import Tiling, real_patches, sub_image_overlap
from hired.policies import Candidates, Policy
from hired.tower import Sight, Tower
from hired.types import Partitions, VisualTokens

# 18,000 patches fill a GPU, and the MLP of a ViT-L/14-336 then holds 0.3 GB at half precision.
MAX_PARTITIONS = 32


class Encoder:
    """Looks at partitions and keeps the visual tokens that a policy chooses within a budget.

    ``tower`` is a ``CLIPVisionModel`` of transformers; layers above the feature layer may be missing.
    ``feature_layer`` indexes its ``hidden_states``, so -2 is the output of the last layer but one.
    ``handoff_dtype`` is what features travel in; ``max_partitions`` bounds memory (an image is never split).
    Raises ModelError for towers that do not fit.
    """

    def __init__(
        self,
        tower: Any,
        tiling: Tiling,
        *,
        feature_layer: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        handoff_dtype: torch.dtype = torch.float16,
        max_partitions: int = MAX_PARTITIONS,
    ) -> None:
        self._tower = Tower(tower)
        if (self._tower.side, self._tower.patch_size) != (tiling.side, tiling.patch_size):
            raise ModelError(
                f"the tower sees {self._tower.side} px in patches of {self._tower.patch_size} px, "
                f"the tiling cuts {tiling.side} px in patches of {tiling.patch_size} px"
            )
        self.tiling = tiling
        self.feature_layer = self._tower.layer_of(feature_layer)
        self.handoff_dtype = handoff_dtype
        self.max_partitions = max_partitions
        self._mean, self._std = (
            torch.tensor(values, device=self._tower.device)[:, None, None]
            for values in (image_mean, image_std)
        )

    @torch.no_grad()
    def encode(
        self, partitions: Sequence[Partitions], *, budget: Budget, policy: str | Policy = "hired"
    ) -> list[VisualTokens]:
        """The visual tokens that remain of each image, on the host.

        Raises ConfigurationError for an unknown policy, one that breaks its promises, and partitions that
        were cut for another tower.
        """
        policy = policies.get(policy) if isinstance(policy, str) else policy
        selections = [self._select(batch, budget, policy) for batch in self._batches(partitions)]
        return _visual_tokens(selections, policy)

    @torch.no_grad()
    def cls_attention(
        self, partitions: Sequence[Partitions], *, layers: Sequence[int] | None = None
    ) -> list[dict[int, Tensor]]:
        """What CLS attends to in each image, by layer: float32 ``[k + 1, patches]``, summed over heads.

        ``layers`` count from 0; by default the two that HiRED reads, 0 and the feature layer.
        """
        layers = (0, self.feature_layer) if layers is None else layers
        if not layers or not 0 <= min(layers) <= max(layers) < self._tower.num_layers:
            raise ConfigurationError(
                f"this tower has the layers 0 to {self._tower.num_layers - 1}; {list(layers)} were asked for"
            )
        maps = []
        for batch in self._batches(partitions):
            from_cls = self._tower.look(self._normalised(batch.pixels), max(layers), layers).from_cls
            stacked = torch.stack([from_cls[layer] for layer in layers]).cpu()
            for image in torch.split(stacked, batch.num_partitions, dim=1):
                maps.append(dict(zip(layers, image.unbind(), strict=True)))
        return maps

    def _batches(self, images: Sequence[Partitions]) -> Iterator[_Batch]:
        """Neighbouring images, as many as ``max_partitions`` allows and at least one."""
        batch: list[Partitions] = []
        num_partitions = 0
        for image in images:
            if image.side != self.tiling.side:
                raise ConfigurationError(
                    f"partitions of {image.side} px do not fit a tower for {self.tiling.side} px; cut images "
                    "with the tiling of the model that encodes them"
                )
            if batch and num_partitions + image.grid.num_partitions > self.max_partitions:
                yield _Batch.of(batch, self.tiling)
                batch, num_partitions = [], 0
            batch.append(image)
            num_partitions += image.grid.num_partitions
        if batch:
            yield _Batch.of(batch, self.tiling)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, side, side, 3]`` to float32 ``[n, 3, side, side]``, as the image processor would."""
        channels_first = pixels.to(self._tower.device, non_blocking=True).permute(0, 3, 1, 2)
        return (channels_first / 255 - self._mean) / self._std

    def _select(self, batch: _Batch, budget: Budget, policy: Policy) -> _Selection:
        layers = policy.layers(self.feature_layer)
        if not all(0 <= layer <= self.feature_layer for layer in layers):
            raise ConfigurationError(
                f"the policy {policy.name!r} reads the layers {layers}; features come from layer "
                f"{self.feature_layer}, and none above it is run"
            )
        limits = [policy.num_tokens(budget, real) for real in batch.real_by_image]
        sight = self._tower.look(self._normalised(batch.pixels), self.feature_layer, layers)
        row = batch.row.to(self._tower.device, non_blocking=True)
        candidates = self._candidates(batch, sight, row, limits, budget.alpha)
        keep = policy.select(candidates)
        if keep.shape != candidates.real.shape or keep.dtype != torch.bool:
            raise ConfigurationError(
                f"the policy {policy.name!r} must return bool {list(candidates.real.shape)}, "
                f"not {keep.dtype} {list(keep.shape)}"
            )
        # The size is known beforehand, so nothing waits for it; -1 fills what a policy leaves unused.
        places = keep.nonzero_static(size=sum(map(min, limits, batch.num_before)), fill_value=-1)
        image, partition, patch = places.clamp(min=0).unbind(-1)
        features = sight.features_at(row[image, partition], patch).to(self.handoff_dtype)
        return _Selection(batch, limits, features, places, keep.sum((1, 2)))

    def _candidates(
        self, batch: _Batch, sight: Sight, row: Tensor, limits: Sequence[int], alpha: float
    ) -> Candidates:
        present, real, overlap, num_tokens = (
            tensor.to(self._tower.device, non_blocking=True)
            for tensor in (batch.present, batch.real, batch.overlap, torch.tensor(limits))
        )

        def by_image(values: Tensor) -> Tensor:
            """From ``[n, patches, ...]`` of all partitions to ``[images, partitions, patches, ...]``."""
            absent = ~present.reshape(present.shape + (1,) * (values.ndim - 2))
            return values[row].masked_fill(absent, 0)

        return Candidates(
            present=present,
            real=real,
            overlap=overlap,
            num_tokens=num_tokens,
            alpha=alpha,
            feature_layer=self.feature_layer,
            cls_attention={layer: by_image(attention) for layer, attention in sight.from_cls.items()},
            keys=lambda: by_image(sight.keys()),
            features=lambda: by_image(sight.features()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Images whose partitions go through the tower together; on the host.

    ``pixels`` are those of all partitions, one image after the other; ``row`` int64 ``[images, partitions]``
    says where among them a partition of an image lies. For the other tensors see ``Candidates``.
    """

    images: tuple[Partitions, ...]
    pixels: Tensor
    row: Tensor
    present: Tensor
    real: Tensor
    overlap: Tensor

    @classmethod
    def of(cls, images: Sequence[Partitions], tiling: Tiling) -> _Batch:
        per_side, side = tiling.patches_per_side, tiling.side
        num_partitions = [image.grid.num_partitions for image in images]
        rows = torch.split(torch.arange(sum(num_partitions)), num_partitions)
        real = [real_patches(image.original_size, image.grid, per_side) for image in images]
        overlap = [sub_image_overlap(image.original_size, image.grid, per_side, side) for image in images]
        return cls(
            images=tuple(images),
            pixels=torch.from_numpy(np.concatenate([image.pixels for image in images])),
            row=pad_sequence(list(rows), batch_first=True),
            present=pad_sequence([torch.ones_like(mask) for mask in real], batch_first=True),
            real=pad_sequence(real, batch_first=True),
            overlap=pad_sequence(overlap, batch_first=True),
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


@dataclass(frozen=True, slots=True, eq=False)
class _Selection:
    """What remains of a batch: features ``[m, d]`` and ``places`` int64 ``[m, 3]``.

    A place is image, partition and patch, sorted; places that the policy left unused are -1 and come last.
    ``num_kept`` ``[images]`` is what the policy kept, ``limits`` what it might have.
    """

    batch: _Batch
    limits: list[int]
    features: Tensor
    places: Tensor
    num_kept: Tensor


def _visual_tokens(selections: Sequence[_Selection], policy: Policy) -> list[VisualTokens]:
    """Copies everything to the host, at once, and divides it among the images."""
    if not selections:
        return []
    num_places = [len(selection.places) for selection in selections]
    num_images = [len(selection.limits) for selection in selections]
    features = torch.split(torch.cat([s.features for s in selections]).cpu(), num_places)
    places = torch.split(torch.cat([s.places for s in selections]).cpu(), num_places)
    num_kept = torch.split(torch.cat([s.num_kept for s in selections]).cpu(), num_images)
    tokens = []
    for selection, *on_host in zip(selections, features, places, num_kept, strict=True):
        tokens += _by_image(_Selection(selection.batch, selection.limits, *on_host), policy)
    return tokens


def _by_image(selection: _Selection, policy: Policy) -> list[VisualTokens]:
    batch, num_kept = selection.batch, selection.num_kept.tolist()
    _check_promises(selection, num_kept, policy)
    features = torch.split(selection.features[: sum(num_kept)], num_kept)
    places = torch.split(selection.places[: sum(num_kept)], num_kept)
    return [
        # Copies, because a slice would take the whole batch along when it is pickled.
        VisualTokens(
            features=own_features.clone(),
            partition=own_places[:, 1].clone(),
            patch=own_places[:, 2].clone(),
            grid=image.grid,
            original_size=image.original_size,
            num_before=num_before,
        )
        for image, num_before, own_features, own_places in zip(
            batch.images, batch.num_before, features, places, strict=True
        )
    ]


def _check_promises(selection: _Selection, num_kept: Sequence[int], policy: Policy) -> None:
    for num, limit in zip(num_kept, selection.limits, strict=True):
        if not 0 < num <= limit:
            raise ConfigurationError(
                f"the policy {policy.name!r} kept {num} tokens of an image; it may keep 1 to {limit}"
            )
    used = selection.places[: sum(num_kept)]
    if len(used) < sum(num_kept) or not selection.batch.real[used.unbind(-1)].all():
        raise ConfigurationError(f"the policy {policy.name!r} kept padding")
