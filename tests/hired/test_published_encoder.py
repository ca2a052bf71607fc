"""The published way of encoding against ours: the same tokens for the same policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hired.budget import Budget
from hired.errors import ModelError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.policies import Candidates, Policy
from hired.published_encoder import PublishedEncoder
from tests.pictures import picture
from tests.towers import IMAGE_MEAN, IMAGE_STD, encoder_of, tiling_of, tiny_tower

SIZES = [(64, 64), (100, 60), (60, 100), (300, 33), (24, 200)]
BUDGETS = [Budget(rate=0.2), Budget(rate=0.4, alpha=0.25), Budget(tokens=7)]


def published(tiling: Tiling, projector: Any, **options: Any) -> PublishedEncoder:
    tower = tiny_tower()
    tower.set_attn_implementation("eager")
    defaults = {"feature_layer": -2, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    return PublishedEncoder(tower, projector, tiling, **(defaults | options))


@pytest.mark.parametrize("policy", ["hired", "hired-reference", "keep-all"])
@pytest.mark.parametrize("feature_layer", [-2, -1])
def test_it_keeps_the_tokens_of_our_encoder_projected(policy: str, feature_layer: int) -> None:
    projector = torch.nn.Linear(64, 8)
    ours = encoder_of(tiny_tower(), feature_layer=feature_layer)
    theirs = published(ours.tiling, projector, feature_layer=feature_layer)
    images = [partition(picture(*size, noise=80), ours.tiling) for size in SIZES]
    for budget in BUDGETS:
        for mine, other in zip(
            ours.encode(images, budget=budget, policy=policy),
            theirs.encode(images, budget=budget, policy=policy),
            strict=True,
        ):
            assert mine.partition.equal(other.partition)
            assert mine.patch.equal(other.patch)
            torch.testing.assert_close(projector(mine.features), other.features, atol=1e-4, rtol=1e-4)


def test_the_published_allocation_equals_ours_where_one_sub_image_takes_all() -> None:
    """With one sub-image without padding its band is the whole picture, in both readings of Eq. 1."""
    ours = encoder_of(tiny_tower(), grids=((1, 1),))
    theirs = published(ours.tiling, torch.nn.Identity())
    images = [partition(picture(side, side, noise=80), ours.tiling) for side in (32, 64, 90)]
    for budget in (Budget(rate=0.25), Budget(rate=0.5), Budget(tokens=6)):
        for mine, other in zip(
            ours.encode(images, budget=budget, policy="hired"),
            theirs.encode(images, budget=budget),
            strict=True,
        ):
            assert (mine.partition.tolist(), mine.patch.tolist()) == (
                other.partition.tolist(),
                other.patch.tolist(),
            )


def test_all_tokens_are_projected_and_all_layers_run() -> None:
    rows: list[int] = []
    projector = torch.nn.Linear(64, 8)
    projector.register_forward_hook(lambda _, __, output: rows.append(output.shape[:-1].numel()))
    tower = tiny_tower()
    tower.set_attn_implementation("eager")
    ran: list[int] = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda _, __, ___, index=index: ran.append(index))
    encoder = PublishedEncoder(
        tower, projector, tiling_of(tower), feature_layer=-2, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    image = partition(picture(64, 64), tiling_of(tower))
    encoder.encode([image], budget=Budget(rate=0.2))
    assert rows == [5 * 16]
    assert ran == [0, 1, 2, 3]


def test_a_tower_without_attention_maps_is_refused() -> None:
    tower = tiny_tower()
    with pytest.raises(ModelError, match='attn_implementation="eager"'):
        PublishedEncoder(
            tower,
            torch.nn.Identity(),
            tiling_of(tower),
            feature_layer=-2,
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )


class _ReadsKeys(Policy):
    name = "reads-keys"

    def select(self, candidates: Candidates) -> torch.Tensor:
        return candidates.keys()[..., 0] > 0


def test_a_policy_that_reads_keys_is_refused() -> None:
    tiling = tiling_of(tiny_tower())
    with pytest.raises(ModelError, match="reads no keys"):
        published(tiling, torch.nn.Identity()).encode(
            [partition(picture(), tiling)], budget=Budget(rate=0.2), policy=_ReadsKeys()
        )
