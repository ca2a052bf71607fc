"""Every policy behind a real tower: what it reads, what travels on, and that nobody waits for a device."""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from hired.budget import Budget
from hired.encoder import Encoder
from hired.errors import ConfigurationError, ModelError
from hired.partitioning import partition
from hired.policies import Candidates, Merged, Policy
from hired.policies.pool import Pool
from hired.policies.prumerge import PruMerge
from hired.policies.random import Random
from hired.published_encoder import PublishedEncoder
from hired.types import Partitions, VisualTokens
from tests.hired.policies.test_every_policy import NAMES, policy_of
from tests.pictures import picture
from tests.towers import IMAGE_MEAN, IMAGE_STD, encoder_of, tiling_of, tiny_tower

SIZES = [(64, 64), (100, 60), (60, 100), (300, 33), (24, 200), (20, 18)]


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    return tiny_tower()


@pytest.fixture(scope="module")
def encoder(tower: CLIPVisionModel) -> Encoder:
    return encoder_of(tower, max_patches=8 * 16)


@pytest.fixture(scope="module")
def images(encoder: Encoder) -> list[Partitions]:
    return [partition(picture(*size, noise=80), encoder.tiling) for size in SIZES]


def places(tokens: VisualTokens) -> list[tuple[int, int]]:
    return list(zip(tokens.partition.tolist(), tokens.patch.tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
class TestEveryPolicy:
    @pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
    def test_an_image_is_the_same_alone_and_in_company(
        self, encoder: Encoder, images: list[Partitions], name: str, rate: float
    ) -> None:
        budget, policy = Budget(rate=rate), policy_of(name)
        for image, tokens in zip(images, encoder.encode(images, budget=budget, policy=policy), strict=True):
            [alone] = encoder.encode([image], budget=budget, policy=policy)
            assert places(tokens) == places(alone)
            torch.testing.assert_close(tokens.features, alone.features, atol=1e-4, rtol=1e-4)
            if name not in ("hired-reference", "keep-all", "thumbnail"):
                assert len(tokens) == budget.num_tokens(tokens.num_before)

    @pytest.mark.gpu
    def test_a_gpu_keeps_the_same_tokens(self, encoder: Encoder, images: list[Partitions], name: str) -> None:
        on_gpu = encoder_of(tiny_tower().cuda(), max_patches=12 * 16)
        budget, policy = Budget(rate=0.2), policy_of(name)
        for tokens, others in zip(
            on_gpu.encode(images, budget=budget, policy=policy),
            encoder.encode(images, budget=budget, policy=policy),
            strict=True,
        ):
            assert places(tokens) == places(others)
            assert np.allclose(tokens.features, others.features, atol=1e-2)

    @pytest.mark.gpu
    def test_nothing_waits_for_a_gpu_but_the_copy_of_the_results(
        self, images: list[Partitions], name: str
    ) -> None:
        on_gpu, policy = encoder_of(tiny_tower().cuda(), max_patches=12 * 16), policy_of(name)
        on_gpu.encode(images, budget=Budget(rate=0.2), policy=policy)  # libraries may wait when first used
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                on_gpu.encode(images, budget=Budget(rate=0.2), policy=policy)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        assert len(waits) <= 1, waits


class TestMerging:
    def test_merged_tokens_are_the_policys_own(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions]
    ) -> None:
        """Sixteen patches pooled to four on a canvas without padding: means of two by two."""
        [tokens] = encoder.encode(images[:1], budget=Budget(rate=0.25), policy=Pool())
        [everything] = encoder.encode(images[:1], budget=Budget(rate=1.0), policy="keep-all")
        squares = everything.features.view(5, 2, 2, 2, 2, -1)
        torch.testing.assert_close(tokens.features.view(5, 2, 2, -1), squares.mean((2, 4)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_towers_hand_over_what_was_merged(
        self, images: list[Partitions], dtype: torch.dtype
    ) -> None:
        half = encoder_of(tiny_tower().to(dtype), handoff_dtype=torch.float16)
        for name in ("pool", "prumerge", "prumerge+", "visionzip"):
            for tokens in half.encode(images, budget=Budget(rate=0.2), policy=name):
                assert len(tokens) == Budget(rate=0.2).num_tokens(tokens.num_before)
                assert tokens.features.dtype == torch.float16
                assert tokens.features.isfinite().all()

    def test_the_published_way_of_encoding_refuses_them(
        self, encoder: Encoder, images: list[Partitions]
    ) -> None:
        eager = tiny_tower()
        eager.set_attn_implementation("eager")
        published = PublishedEncoder(
            eager,
            torch.nn.Identity(),
            encoder.tiling,
            feature_layer=-2,
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )
        with pytest.raises(ConfigurationError, match="'pool' merges tokens"):
            published.encode(images[:1], budget=Budget(rate=0.2), policy="pool")

    def test_merged_features_of_another_shape_are_told(
        self, encoder: Encoder, images: list[Partitions]
    ) -> None:
        with pytest.raises(ConfigurationError, match="'flat' must merge tokens into"):
            encoder.encode(images[:1], budget=Budget(rate=0.2), policy=_Flat())


class _Flat(Policy):
    name: ClassVar[str] = "flat"

    def select(self, candidates: Candidates) -> Merged:
        keep = candidates.real & (candidates.real.flatten(1).cumsum(-1) <= 1).view_as(candidates.real)
        return Merged(keep, candidates.features()[0])


class _Witness(Policy):
    """Keeps the first token and remembers what it saw with one head."""

    name: ClassVar[str] = "witness"

    def __init__(self, layers_above: int) -> None:
        self.layers_above = layers_above
        self.seen: list[tuple[Tensor, Tensor]] = []

    def select(self, candidates: Candidates) -> Tensor:
        self.seen.append(candidates.single_head(self.layers_above))
        return candidates.real & (candidates.real.flatten(1).cumsum(-1) <= 1).view_as(candidates.real)


class TestSingleHead:
    @pytest.mark.parametrize("layers_above", [0, 1])
    def test_it_is_what_one_wide_head_of_that_layer_would_attend_to(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions], layers_above: int
    ) -> None:
        witness = _Witness(layers_above)
        encoder.encode(images[:1], budget=Budget(tokens=1), policy=witness)
        [(attention, keys)] = witness.seen

        pixels = torch.from_numpy(images[0].pixels.copy()).permute(0, 3, 1, 2) / 255
        pixels = (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
        with torch.no_grad():
            states = tower(pixels, output_hidden_states=True).hidden_states[2 + layers_above]
            layer = tower.encoder.layers[2 + layers_above]
            normed = layer.layer_norm1(states)
            queries, expected_keys = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
            maps = (queries @ expected_keys.transpose(1, 2) / queries.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(attention[0], maps[:, 0, 1:], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(keys[0], expected_keys[:, 1:], atol=1e-5, rtol=1e-4)

    def test_a_tower_without_the_layer_above_is_refused_with_the_mend(self, images: list[Partitions]) -> None:
        top = encoder_of(tiny_tower(), feature_layer=-1)
        with pytest.raises(ModelError, match=r"PruMerge\(layers_above=0\)"):
            top.encode(images, budget=Budget(rate=0.2), policy="prumerge")
        for tokens in top.encode(images, budget=Budget(rate=0.2), policy=PruMerge(layers_above=0)):
            assert len(tokens) == Budget(rate=0.2).num_tokens(tokens.num_before)


class TestRandom:
    def test_the_same_picture_keeps_the_same_patches_and_another_does_not(
        self, encoder: Encoder, images: list[Partitions]
    ) -> None:
        other = partition(picture(64, 64, noise=60), encoder.tiling)
        batch = [images[0], other, images[0]]
        one, another, again = encoder.encode(batch, budget=Budget(rate=0.3), policy=Random())
        assert places(one) == places(again)
        assert places(one) != places(another)
        [reseeded] = encoder.encode(batch[:1], budget=Budget(rate=0.3), policy=Random(seed=1))
        assert places(one) != places(reseeded)

    def test_a_pictures_fingerprint_is_its_pixels(self) -> None:
        from hired.batches import Batch

        tiling = tiling_of(tiny_tower())
        one, other = (partition(picture(64, 64, noise=noise), tiling) for noise in (80, 60))
        numbers = Batch.of([one, other, one], tiling, 20).fingerprints()
        assert numbers[0] == numbers[2] != numbers[1]
        assert all(0 <= number < 2**64 for number in numbers)
