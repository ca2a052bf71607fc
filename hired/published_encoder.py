"""The way in which HiRED's published code encodes (hasanar1f/HiRED), for comparison of its cost with ours.

Its attention maps are eager and of all layers, the last layer is run, and every token is projected before
most are dropped. Whole maps of a ViT-L/14-336 are 0.26 GB a partition at half precision, where the rows that
are read take 0.1 MB. The choice itself is a policy's, as in ``Encoder``, so that both keep the same tokens
for the same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from hired import policies
from hired.batches import Batch
from hired.budget import Budget
from hired.errors import ConfigurationError, ModelError
from hired.geometry import Tiling
from hired.policies import Merged, Policy
from hired.tower import Tower
from hired.types import Partitions


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedTokens:
    """The visual tokens that remain of one image, after the projector: ``features`` ``[n, d]``.

    ``partition`` and ``patch`` as in ``VisualTokens``. All on the tower's device.
    """

    features: Tensor
    partition: Tensor
    patch: Tensor


class PublishedEncoder:
    """Attention maps of all layers, projection of all tokens, then selection.

    ``tower`` is a ``CLIPVisionModel`` of transformers with all its layers, set to eager attention;
    ``projector`` maps ``[n, patches, d]`` to what the language model reads. Raises ModelError for a tower
    that gives no attention maps.
    """

    def __init__(
        self,
        tower: Any,
        projector: Callable[[Tensor], Tensor],
        tiling: Tiling,
        *,
        feature_layer: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        if tower.config._attn_implementation != "eager":
            raise ModelError(
                f"{tower.config._attn_implementation} attention gives no maps; load the tower with "
                'attn_implementation="eager"'
            )
        self._module = tower
        self._projector = projector
        self._tiling = tiling
        self._feature_layer = Tower(tower).layer_of(feature_layer)
        self._mean, self._std = (
            torch.tensor(values, device=tower.device)[:, None, None] for values in (image_mean, image_std)
        )

    @torch.no_grad()
    def encode(
        self, images: Sequence[Partitions], *, budget: Budget, policy: str | Policy = "hired-reference"
    ) -> list[ProjectedTokens]:
        """The tokens that remain of each image, all images in one batch.

        The policy sees CLS attention alone. Raises ConfigurationError for an unknown policy and for one that
        merges tokens.
        """
        policy = policies.get(policy) if isinstance(policy, str) else policy
        batch = Batch.of(images, self._tiling)
        copy = batch.map(lambda tensor: tensor.to(self._module.device))
        pixels = (copy.pixels.permute(0, 3, 1, 2) / 255 - self._mean) / self._std
        seen = self._module(pixels.to(self._module.dtype), output_hidden_states=True, output_attentions=True)
        features = seen.hidden_states[self._feature_layer + 1][:, 1:]
        projected = self._projector(features)

        limits = [policy.num_tokens(budget, real) for real in batch.real_by_image]
        candidates = copy.candidates(
            limits=limits,
            num_before=batch.num_before,
            alpha=budget.alpha,
            feature_layer=self._feature_layer,
            from_cls={
                layer: seen.attentions[layer][:, :, 0, 1:].float().sum(1)
                for layer in policy.layers(self._feature_layer)
            },
            keys=_not_computed,
            features=lambda: features,
            single_head=lambda _: _not_computed(),
            by_head=lambda layer: seen.attentions[layer][:, :, 0, 1:].float(),
        )
        keep = policy.select(candidates)
        if isinstance(keep, Merged):
            raise ConfigurationError(
                f"the policy {policy.name!r} merges tokens, which the published way of encoding does not do; "
                "choose one that only drops them"
            )
        kept = []
        for image, rows in zip(keep, copy.row, strict=True):
            partition, patch = image.nonzero(as_tuple=True)
            kept.append(ProjectedTokens(projected[rows[partition], patch], partition, patch))
        return kept


def _not_computed() -> NoReturn:
    raise ModelError("the published code reads no keys; choose a policy that reads CLS attention alone")
