"""``Partitions`` -> ``VisualTokens``: the half of the model that sees.

Images of different grids share batches. Every choice is made inside one image, so its tokens are the same
alone and in company. Nothing waits for the device until the results are copied to the host, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hired import policies
from hired.batches import Batch, batches, few_sizes
from hired.budget import Budget
from hired.errors import ConfigurationError, ModelError
from hired.geometry import Tiling
from hired.policies import Candidates, Merged, Policy
from hired.tower import Sight, Tower
from hired.transfer import on_device, on_host
from hired.types import Partitions, VisualTokens

# 32 partitions of 576 patches fill a GPU; the MLP of a ViT-L then holds 0.3 GB at half precision.
MAX_PATCHES_ON_GPU = 32 * 576
# One image of five partitions: a CPU gains nothing from more, and loses a tenth when caches overflow.
MAX_PATCHES_ON_CPU = 5 * 576


class Encoder:
    """Looks at partitions and keeps the visual tokens that a policy chooses within a budget.

    ``tower`` is a ``CLIPVisionModel`` of transformers; layers above the feature layer may be missing.
    ``feature_layer`` indexes its ``hidden_states``, so -2 is the output of the last layer but one.
    ``handoff_dtype`` is what features travel in. ``max_patches`` that go through the tower together bound
    memory (an image is never split); by default what the device needs to be busy. ``compile`` runs the layers
    of large batches compiled: a wait when a batch size is first met, of which there are at most eight.
    Raises ModelError for towers that do not fit, ConfigurationError for a ``max_patches`` below one.
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
        max_patches: int | None = None,
        compile: bool = False,
    ) -> None:
        if max_patches is not None and max_patches < 1:
            raise ConfigurationError(f"max_patches={max_patches} lets nothing through; give 1 or more")
        self._tower = Tower(tower)
        if (self._tower.side, self._tower.patch_size) != (tiling.side, tiling.patch_size):
            raise ModelError(
                f"the tower sees {self._tower.side} px in patches of {self._tower.patch_size} px, "
                f"the tiling cuts {tiling.side} px in patches of {tiling.patch_size} px"
            )
        on_gpu = self._tower.device.type == "cuda"
        self.max_patches = max_patches or (MAX_PATCHES_ON_GPU if on_gpu else MAX_PATCHES_ON_CPU)
        self._max_partitions = max(1, self.max_patches // tiling.patches_per_side**2)
        self._sizes = few_sizes(self._max_partitions) if compile else ()
        self.tiling = tiling
        self.feature_layer = self._tower.layer_of(feature_layer)
        self.handoff_dtype = handoff_dtype
        self._mean, self._std = (
            torch.tensor(values, device=self._tower.device)[:, None, None]
            for values in (image_mean, image_std)
        )

    @property
    def num_layers(self) -> int:
        """The tower's layers, whose attention can be read."""
        return self._tower.num_layers

    @torch.no_grad()
    def encode(
        self, partitions: Sequence[Partitions], *, budget: Budget, policy: str | Policy = "hired"
    ) -> list[VisualTokens]:
        """The visual tokens that remain of each image, on the host.

        Raises ConfigurationError for an unknown policy, one that breaks its promises, and partitions that
        were cut for another tower.
        """
        policy = policies.get(policy) if isinstance(policy, str) else policy
        layers = self._layers(policy)
        selections = [
            self._select(batch, copy, budget, policy, self._look(copy, self.feature_layer, layers))
            for batch, copy in self._on_device(partitions)
        ]
        return _visual_tokens(selections, policy)

    @torch.no_grad()
    def encode_each(
        self, partitions: Sequence[Partitions], choices: Sequence[tuple[Policy, Budget]]
    ) -> list[list[VisualTokens]]:
        """What ``encode`` gives for each of the ``choices``, and in each for each image, after one look.

        The last layer runs for all patches, where ``encode`` spares it those that are dropped; features
        differ from its by what products of another shape are rounded to.
        """
        layers = {layer for policy, _ in choices for layer in self._layers(policy)}
        selections: list[list[_Selection]] = [[] for _ in choices]
        for batch, copy in self._on_device(partitions):
            sight = _Remembered(self._look(copy, self.feature_layer, sorted(layers)))
            for chosen, (policy, budget) in zip(selections, choices, strict=True):
                chosen.append(self._select(batch, copy, budget, policy, sight))
        return [
            _visual_tokens(chosen, policy) for chosen, (policy, _) in zip(selections, choices, strict=True)
        ]

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
        stacked, num_partitions = [], []
        for batch, copy in self._on_device(partitions):
            from_cls = self._look(copy, max(layers), layers).from_cls
            maps = torch.stack([from_cls[layer] for layer in layers])
            stacked.append(maps[:, : sum(batch.num_partitions)])
            num_partitions.append(batch.num_partitions)
        return [
            dict(zip(layers, image.unbind(), strict=True))
            for maps, num in zip(on_host(stacked), num_partitions, strict=True)
            for image in torch.split(maps, num, dim=1)
        ]

    def _on_device(self, images: Sequence[Partitions]) -> Iterator[tuple[Batch, Batch]]:
        """Batches as they are on the host and on the tower's device."""
        return on_device(batches(images, self.tiling, self._max_partitions, self._sizes), self._tower.device)

    def _look(self, copy: Batch, last_layer: int, read_layers: Sequence[int]) -> Sight:
        pixels = self._normalised(copy.pixels)
        return self._tower.look(pixels, last_layer, read_layers, compiled=len(pixels) in self._sizes)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, side, side, 3]`` to float32 ``[n, 3, side, side]``, as the image processor would.

        To the same bits, in place; channels stay last in memory, as convolutions like it.
        """
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(self._mean).div_(self._std)

    def _layers(self, policy: Policy) -> tuple[int, ...]:
        """The layers whose CLS attention the policy reads; raises ConfigurationError for others' numbers."""
        layers = policy.layers(self.feature_layer)
        if not all(0 <= layer <= self.feature_layer for layer in layers):
            raise ConfigurationError(
                f"the policy {policy.name!r} reads the layers {layers}; features come from layer "
                f"{self.feature_layer}, and none above it is run"
            )
        return layers

    def _select(
        self, batch: Batch, copy: Batch, budget: Budget, policy: Policy, sight: Sight | _Remembered
    ) -> _Selection:
        """Queues all that follows a look at a batch; ``copy`` is the one on the device."""
        num_before = batch.num_before
        limits = [policy.num_tokens(budget, real) for real in batch.real_by_image]
        candidates = copy.candidates(
            limits=limits,
            num_before=num_before,
            alpha=budget.alpha,
            feature_layer=self.feature_layer,
            from_cls=sight.from_cls,
            keys=sight.keys,
            features=sight.features,
            single_head=sight.single_head,
            by_head=sight.from_cls_by_head.__getitem__,
        )
        keep, merged = _chosen(policy, candidates)
        # The size is known beforehand, so nothing waits for it; -1 fills what a policy leaves unused.
        places = keep.nonzero_static(size=sum(map(min, limits, num_before)), fill_value=-1)
        image, partition, patch = places.clamp(min=0).unbind(-1)
        features = (
            sight.features_at(copy.row[image, partition], patch)
            if merged is None
            else merged[image, partition, patch]
        )
        return _Selection(
            batch.images, batch.real, limits, features.to(self.handoff_dtype), places, keep.sum((1, 2))
        )


class _Remembered:
    """A ``Sight`` at which several policies look; nothing is computed twice."""

    def __init__(self, sight: Sight) -> None:
        self.from_cls, self.from_cls_by_head = sight.from_cls, sight.from_cls_by_head
        self.keys, self.features = cache(sight.keys), cache(sight.features)
        self.single_head = cache(sight.single_head)

    def features_at(self, partition: Tensor, patch: Tensor) -> Tensor:
        return self.features()[partition, patch]


@dataclass(frozen=True, slots=True, eq=False)
class _Selection:
    """What remains of a batch: features ``[m, d]`` and ``places`` int64 ``[m, 3]``.

    A place is image, partition and patch, sorted; places that the policy left unused are -1 and come last.
    ``num_kept`` ``[images]`` is what the policy kept, ``limits`` what it might have; ``real`` stays on the
    host, see ``Candidates``.
    """

    images: tuple[Partitions, ...]
    real: Tensor
    limits: list[int]
    features: Tensor
    places: Tensor
    num_kept: Tensor


def _chosen(policy: Policy, candidates: Candidates) -> tuple[Tensor, Tensor | None]:
    """The places that the policy keeps, and its own features where it made some."""
    answer = policy.select(candidates)
    keep, merged = (answer.keep, answer.features) if isinstance(answer, Merged) else (answer, None)
    shape = candidates.real.shape
    if keep.shape != shape or keep.dtype != torch.bool:
        raise ConfigurationError(
            f"the policy {policy.name!r} must return bool {list(shape)}, not {keep.dtype} {list(keep.shape)}"
        )
    if merged is not None and (merged.shape[:-1] != shape or not merged.is_floating_point()):
        raise ConfigurationError(
            f"the policy {policy.name!r} must merge tokens into {[*shape, 'd']}, "
            f"not {merged.dtype} {list(merged.shape)}"
        )
    return keep, merged


def _visual_tokens(selections: Sequence[_Selection], policy: Policy) -> list[VisualTokens]:
    """Copies everything to the host, at once, and divides it among the images."""
    copies = on_host([t for s in selections for t in (s.features, s.places, s.num_kept)])
    tokens = []
    for number, selection in enumerate(selections):
        features, places, num_kept = copies[3 * number : 3 * number + 3]
        tokens += _by_image(replace(selection, features=features, places=places, num_kept=num_kept), policy)
    return tokens


def _by_image(selection: _Selection, policy: Policy) -> list[VisualTokens]:
    num_kept, num_real = selection.num_kept.tolist(), selection.real.sum((1, 2)).tolist()
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
            selection.images, num_real, features, places, strict=True
        )
    ]


def _check_promises(selection: _Selection, num_kept: Sequence[int], policy: Policy) -> None:
    for num, limit in zip(num_kept, selection.limits, strict=True):
        if not 0 < num <= limit:
            raise ConfigurationError(
                f"the policy {policy.name!r} kept {num} tokens of an image; it may keep 1 to {limit}"
            )
    used = selection.places[: sum(num_kept)]
    if len(used) < sum(num_kept) or not selection.real[used.unbind(-1)].all():
        raise ConfigurationError(f"the policy {policy.name!r} kept padding")
