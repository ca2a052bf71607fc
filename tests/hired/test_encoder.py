"""The encoder against transformers' own tower, and HiRED against the paper read loop by loop."""

from __future__ import annotations

import math
import pickle
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel
from transformers.models.llava_next.modeling_llava_next import unpad_image

from hired import policies
from hired.budget import Budget
from hired.encoder import Encoder
from hired.errors import ConfigurationError, ModelError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.policies import Candidates, Policy
from hired.policies.hired import Hired
from hired.tower import _through
from hired.types import Grid, Partitions, Size, VisualTokens
from tests.pictures import picture
from tests.towers import GRIDS, IMAGE_MEAN, IMAGE_STD, encoder_of, tiling_of, tiny_tower

# Width and height: square, wide, tall, with padding and without, thin, tiny.
SIZES = [(64, 64), (100, 60), (60, 100), (64, 32), (31, 47), (300, 33), (24, 200), (20, 18), (97, 41)]


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    return tiny_tower()


@pytest.fixture(scope="module")
def encoder(tower: CLIPVisionModel) -> Encoder:
    return encoder_of(tower)


@pytest.fixture(scope="module")
def images(encoder: Encoder) -> list[Partitions]:
    return [partition(picture(*size, noise=80), encoder.tiling) for size in SIZES]


# --- the paper, read naively -----------------------------------------------------------------------------


@dataclass
class Whole:
    """What transformers computes for one image with whole attention maps, as nested lists."""

    hidden_state: Tensor  # [k + 1, 1 + patches, d]
    initial: list[list[list[list[float]]]]  # [k + 1][heads][1 + patches][1 + patches]
    final: list[list[list[list[float]]]]


def whole(tower: CLIPVisionModel, image: Partitions) -> Whole:
    pixels = torch.from_numpy(image.pixels.copy()).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
    with torch.no_grad():
        hidden_state = tower(pixels, output_hidden_states=True).hidden_states[-2]
        tower.set_attn_implementation("eager")
        attentions = tower(pixels, output_attentions=True).attentions
        tower.set_attn_implementation("sdpa")
    return Whole(hidden_state, attentions[0].tolist(), attentions[-2].tolist())


def naive_real(image: Partitions, per_side: int) -> list[set[int]]:
    """The patches of each partition that transformers does not cut off as padding."""
    rows, cols = image.grid.rows * per_side, image.grid.cols * per_side
    numbers = torch.arange(rows * cols).reshape(1, rows, cols)
    remaining = unpad_image(numbers, (image.original_size.height, image.original_size.width))
    real: list[set[int]] = [set(range(per_side**2))] + [set() for _ in range(image.grid.num_sub_images)]
    for number in remaining.flatten().tolist():
        row, col = divmod(number, cols)
        sub_image = (row // per_side) * image.grid.cols + col // per_side
        real[1 + sub_image].add((row % per_side) * per_side + col % per_side)
    return real


def naive_score(image: Partitions, attention: Whole, sub_image: int, per_side: int) -> Fraction:
    """Eq. 1, patch by patch and head by head, each weighted by the part of its area in the sub-image."""
    top = sub_image // image.grid.cols * image.side
    left = sub_image % image.grid.cols * image.side
    content = image.content
    score = Fraction(0)
    for patch in range(per_side**2):
        row, col = divmod(patch, per_side)
        patch_top = content.top + Fraction(row * content.height, per_side)
        patch_bottom = content.top + Fraction((row + 1) * content.height, per_side)
        patch_left = content.left + Fraction(col * content.width, per_side)
        patch_right = content.left + Fraction((col + 1) * content.width, per_side)
        height = min(patch_bottom, top + image.side) - max(patch_top, top)
        width = min(patch_right, left + image.side) - max(patch_left, left)
        if height <= 0 or width <= 0:
            continue
        area = (patch_bottom - patch_top) * (patch_right - patch_left)
        for head in attention.initial[0]:
            score += Fraction(head[0][1 + patch]) * height * width / area
    return score


def naive_shares(total: int, scores: list[Fraction], room: list[int]) -> list[int]:
    """Eq. 1's budgets: floors, then the largest remainders; full sub-images give up what they cannot take."""
    shares = [0] * len(scores)
    open_ones = list(range(len(scores)))
    while open_ones:
        left = total - sum(shares[i] for i in range(len(scores)) if i not in open_ones)
        quotas = {i: left * scores[i] / sum(scores[j] for j in open_ones) for i in open_ones}
        full = [i for i in open_ones if quotas[i] >= room[i]]
        for i in full:
            shares[i] = room[i]
            open_ones.remove(i)
        if not full:
            for i in open_ones:
                shares[i] = math.floor(quotas[i])
            missing = total - sum(shares)
            for i in sorted(open_ones, key=lambda i: shares[i] - quotas[i])[:missing]:
                shares[i] += 1
            break
    return shares


def naive_hired(
    image: Partitions, attention: Whole, num_tokens: int, alpha: float, per_side: int
) -> list[tuple[int, int]]:
    """The kept (partition, patch) of one image."""
    real = naive_real(image, per_side)
    scores = [naive_score(image, attention, i, per_side) for i in range(image.grid.num_sub_images)]
    room = [len(patches) for patches in real]
    full_image = min(math.floor(Fraction(str(alpha)) * num_tokens), room[0])
    while num_tokens - full_image > sum(room[1:]):
        full_image += 1
    budgets = [full_image, *naive_shares(num_tokens - full_image, scores, room[1:])]
    kept = []
    for number, budget in enumerate(budgets):
        importance = {  # Eq. 2
            patch: sum(head[0][1 + patch] for head in attention.final[number]) for patch in real[number]
        }
        best = sorted(real[number], key=lambda patch: -importance[patch])[:budget]
        kept += [(number, patch) for patch in sorted(best)]
    return kept


def places(tokens: VisualTokens) -> list[tuple[int, int]]:
    return list(zip(tokens.partition.tolist(), tokens.patch.tolist(), strict=True))


class TestHired:
    @pytest.mark.parametrize(
        ("heads", "side", "patch_size", "seed"),
        [(4, 32, 8, 0), (1, 32, 8, 1), (3, 30, 6, 2), (2, 28, 4, 3), (2, 33, 8, 4)],
    )
    @pytest.mark.parametrize("grids", [GRIDS, ((3, 3),)])  # on 3 x 3, sub-images of padding alone are common
    def test_it_equals_eq_1_and_eq_2_read_naively(
        self, heads: int, side: int, patch_size: int, seed: int, grids: tuple[tuple[int, int], ...]
    ) -> None:
        tower = tiny_tower(heads=heads, side=side, patch_size=patch_size, seed=seed)
        encoder, per_side = encoder_of(tower, grids=grids), side // patch_size
        images = [partition(picture(*size, noise=80), encoder.tiling) for size in SIZES]
        attentions = [whole(tower, image) for image in images]
        for budget in (
            *(Budget(rate=0.2, alpha=alpha) for alpha in (0.0, 0.3, 0.5, 1.0)),
            *(Budget(rate=rate) for rate in (0.01, 0.4, 0.77, 1.0)),
            *(Budget(tokens=tokens, alpha=0.25) for tokens in (1, 13, 10_000)),
        ):
            for image, attention, tokens in zip(
                images, attentions, encoder.encode(images, budget=budget), strict=True
            ):
                num_before = sum(map(len, naive_real(image, per_side)))
                num_tokens = budget.num_tokens(num_before)
                expected = naive_hired(image, attention, num_tokens, budget.alpha, per_side)
                assert places(tokens) == expected
                assert (len(tokens), tokens.num_before) == (num_tokens, num_before)
                torch.testing.assert_close(
                    tokens.features,
                    attention.hidden_state[tokens.partition, 1 + tokens.patch],
                    atol=1e-5,
                    rtol=1e-5,
                )

    def test_it_equals_the_naive_reading_on_a_real_photograph(self, corpus: Path) -> None:
        tower = tiny_tower(side=96, patch_size=8)
        encoder = encoder_of(tower)
        image = partition((corpus / "photos" / "kodak-01.png").read_bytes(), encoder.tiling)
        [tokens] = encoder.encode([image], budget=Budget(rate=0.2))
        expected = naive_hired(image, whole(tower, image), len(tokens), 0.5, per_side=12)
        assert places(tokens) == expected

    def test_the_sizes_of_these_tests_cover_the_cases(self, images: list[Partitions]) -> None:
        grids = {image.grid for image in images}
        assert grids == {Grid(1, 1), Grid(1, 2), Grid(2, 1), Grid(2, 2), Grid(1, 3), Grid(3, 1)}
        padded = {image.content.area < image.canvas.height * image.canvas.width for image in images}
        assert padded == {True, False}


class TestKeepAll:
    def test_it_equals_the_tower_at_every_real_patch(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions]
    ) -> None:
        everything = encoder.encode(images, budget=Budget(tokens=1), policy="keep-all")
        for image, tokens in zip(images, everything, strict=True):
            real = naive_real(image, per_side=4)
            assert places(tokens) == [(i, j) for i, patches in enumerate(real) for j in sorted(patches)]
            hidden_state = whole(tower, image).hidden_state
            expected = hidden_state[tokens.partition, 1 + tokens.patch]
            torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=1e-5)

    def test_hired_at_rate_one_keeps_all(self, encoder: Encoder, images: list[Partitions]) -> None:
        for alpha in (0.0, 0.5, 1.0):
            kept = encoder.encode(images, budget=Budget(rate=1.0, alpha=alpha))
            everything = encoder.encode(images, budget=Budget(rate=1.0), policy="keep-all")
            for some, every in zip(kept, everything, strict=True):
                assert_same(some, every)


def assert_same(tokens: VisualTokens, others: VisualTokens) -> None:
    assert places(tokens) == places(others)
    assert (tokens.grid, tokens.original_size, tokens.num_before) == (
        others.grid,
        others.original_size,
        others.num_before,
    )
    torch.testing.assert_close(tokens.features, others.features, atol=1e-5, rtol=1e-5)


class TestBatches:
    @pytest.mark.parametrize("policy", ["hired", "hired-reference", "keep-all"])
    @pytest.mark.parametrize("max_patches", [1, 7 * 16, 10_000])
    def test_an_image_is_the_same_alone_and_in_company(
        self, tower: CLIPVisionModel, images: list[Partitions], policy: str, max_patches: int
    ) -> None:
        encoder = encoder_of(tower, max_patches=max_patches)
        together = encoder.encode(images, budget=Budget(rate=0.2), policy=policy)
        for image, tokens in zip(images, together, strict=True):
            [alone] = encoder.encode([image], budget=Budget(rate=0.2), policy=policy)
            assert_same(tokens, alone)

    def test_a_picture_thinner_than_a_patch_is_an_image_like_any_other(self, encoder: Encoder) -> None:
        thin = [partition(picture(*size, noise=80), encoder.tiling) for size in [(900, 3), (2, 700), (1, 1)]]
        for policy in ("hired", "hired-reference", "keep-all"):
            results = encoder.encode(thin, budget=Budget(rate=0.5), policy=policy)
            assert all(0 < len(tokens) <= tokens.num_before for tokens in results)

    def test_images_come_back_in_order(self, encoder: Encoder, images: list[Partitions]) -> None:
        results = encoder.encode(images, budget=Budget(rate=0.2))
        assert [tokens.original_size for tokens in results] == [image.original_size for image in images]

    def test_no_images_give_no_tokens(self, encoder: Encoder) -> None:
        assert encoder.encode([], budget=Budget(rate=0.2)) == []
        assert encoder.cls_attention([]) == []

    def test_memory_is_bounded_by_the_number_of_patches(
        self, tower: CLIPVisionModel, images: list[Partitions]
    ) -> None:
        sizes = []
        handle = tower.embeddings.register_forward_hook(lambda _, __, states: sizes.append(len(states)))
        encoder_of(tower, max_patches=8 * 16 + 15).encode(images, budget=Budget(rate=0.2))
        handle.remove()
        assert max(sizes) <= 8
        assert sum(sizes) == sum(image.grid.num_partitions for image in images)

    def test_filled_up_batches_through_compiled_layers_keep_the_same_tokens(
        self, encoder: Encoder, images: list[Partitions], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.compiler.reset()
        compiled = torch.compile(_through, dynamic=False, backend="eager")  # needs no compiler of C++
        monkeypatch.setattr("hired.tower._compiled", lambda: compiled)
        tower = tiny_tower()
        filling = encoder_of(tower, max_patches=32 * 16, compile=True)
        sizes: list[int] = []
        tower.embeddings.register_forward_hook(lambda _, __, states: sizes.append(len(states)))
        for policy in ("hired", "keep-all"):
            for tokens, others in zip(
                filling.encode(images, budget=Budget(rate=0.3), policy=policy),
                encoder.encode(images, budget=Budget(rate=0.3), policy=policy),
                strict=True,
            ):
                assert_same(tokens, others)
        assert sum(sizes) > 2 * sum(image.grid.num_partitions for image in images)
        for maps, expected in zip(filling.cls_attention(images), encoder.cls_attention(images), strict=True):
            torch.testing.assert_close(maps, expected)

    @pytest.mark.parametrize("max_patches", [0, -1])
    def test_a_bound_that_lets_nothing_through_is_refused(
        self, tower: CLIPVisionModel, max_patches: int
    ) -> None:
        with pytest.raises(ConfigurationError, match="lets nothing through"):
            encoder_of(tower, max_patches=max_patches)

    def test_an_image_does_not_carry_its_neighbours_along(
        self, encoder: Encoder, images: list[Partitions]
    ) -> None:
        for tokens in encoder.encode(images, budget=Budget(rate=0.2)):
            for tensor in (tokens.features, tokens.partition, tokens.patch):
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert len(pickle.loads(pickle.dumps(tokens))) == len(tokens)

    def test_read_only_pixels_are_fine(self, encoder: Encoder, images: list[Partitions]) -> None:
        pixels = images[0].pixels.copy()
        pixels.flags.writeable = False
        frozen = replace(images[0], pixels=pixels)
        assert_same(
            *encoder.encode([frozen], budget=Budget(rate=0.2)),
            *encoder.encode(images[:1], budget=Budget(rate=0.2)),
        )


class TestWork:
    """What is computed and what is not."""

    def test_layers_above_the_feature_layer_are_not_run(self, images: list[Partitions]) -> None:
        tower = tiny_tower()
        tower.encoder.layers[3].register_forward_pre_hook(lambda *_: pytest.fail("the last layer ran"))
        for module in tower.encoder.layers[3].modules():
            module.register_forward_pre_hook(lambda *_: pytest.fail("the last layer ran"))
        assert encoder_of(tower).encode(images, budget=Budget(rate=0.2))

    def test_only_kept_tokens_go_through_the_feature_layers_mlp(self, images: list[Partitions]) -> None:
        tower = tiny_tower()
        rows = []
        for linear in (tower.encoder.layers[2].mlp.fc1, tower.encoder.layers[2].self_attn.out_proj):
            linear.register_forward_hook(lambda _, __, output: rows.append(output.shape[:-1].numel()))
        results = encoder_of(tower).encode(images, budget=Budget(rate=0.2))
        assert sum(rows) == 2 * sum(map(len, results))

    def test_attention_stays_fused(self, images: list[Partitions], monkeypatch: pytest.MonkeyPatch) -> None:
        largest = 0
        softmax = Tensor.softmax

        def watched(logits: Tensor, *args: int) -> Tensor:
            nonlocal largest
            largest = max(largest, logits.shape[-2])
            return softmax(logits, *args)

        monkeypatch.setattr(Tensor, "softmax", watched)
        encoder_of(tiny_tower()).encode(images, budget=Budget(rate=0.2))
        assert largest == 1  # one row a head: that of CLS

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_towers_use_the_budget_too(
        self, images: list[Partitions], dtype: torch.dtype
    ) -> None:
        half = encoder_of(tiny_tower().to(dtype), handoff_dtype=torch.float16)
        for tokens in half.encode(images, budget=Budget(rate=0.2)):
            assert len(tokens) == Budget(rate=0.2).num_tokens(tokens.num_before)
            assert tokens.features.dtype == torch.float16
            assert tokens.features.isfinite().all()

    def test_features_travel_as_float16_by_default(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions]
    ) -> None:
        default = Encoder(
            tower, tiling_of(tower), feature_layer=-2, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
        )
        [half] = default.encode(images[:1], budget=Budget(rate=0.2))
        [full] = encoder.encode(images[:1], budget=Budget(rate=0.2))
        assert half.features.dtype == torch.float16
        assert half.features.equal(full.features.half())
        assert half.partition.dtype == half.patch.dtype == torch.int64


class TestClsAttention:
    def test_it_gives_the_eager_maps_of_each_image(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions]
    ) -> None:
        for image, maps in zip(images, encoder.cls_attention(images), strict=True):
            attention = whole(tower, image)
            assert list(maps) == [0, 2]
            for layer, expected in ((0, attention.initial), (2, attention.final)):
                expected_map = torch.tensor(expected)[:, :, 0, 1:].sum(1)
                torch.testing.assert_close(maps[layer], expected_map, atol=1e-5, rtol=1e-5)

    def test_any_layer_can_be_asked_for(self, encoder: Encoder, images: list[Partitions]) -> None:
        [maps] = encoder.cls_attention(images[:1], layers=[3, 1])
        assert list(maps) == [3, 1]
        assert maps[3].shape == (images[0].grid.num_partitions, 16)
        assert not torch.equal(maps[1], maps[3])

    @pytest.mark.parametrize("layers", [[], [4], [-1]])
    def test_layers_that_are_not_there_are_refused(
        self, encoder: Encoder, images: list[Partitions], layers: list[int]
    ) -> None:
        with pytest.raises(ConfigurationError, match="layers 0 to 3"):
            encoder.cls_attention(images, layers=layers)


class _FirstTokens(Policy):
    """Keeps as many tokens of each image as it may, first come, first served."""

    name: ClassVar[str] = "first-tokens"
    surplus: ClassVar[int] = 0

    def select(self, candidates: Candidates) -> Tensor:
        order = candidates.real.flatten(1).long().cumsum(-1)
        first = order <= candidates.num_tokens[:, None] + self.surplus
        return first.view_as(candidates.real) & candidates.real


class _Greedy(_FirstTokens):
    name = "greedy"
    surplus = 1


class _Idle(Policy):
    name = "idle"

    def select(self, candidates: Candidates) -> Tensor:
        return torch.zeros_like(candidates.real)


class _PaddingLover(Policy):
    name = "padding-lover"

    def select(self, candidates: Candidates) -> Tensor:
        padding = candidates.present & ~candidates.real
        return padding & (padding.flatten(1).cumsum(-1) <= 1).view_as(padding)


class _Misshapen(Policy):
    name = "misshapen"

    def select(self, candidates: Candidates) -> Tensor:
        return candidates.real.flatten()


class _LooksAhead(_FirstTokens):
    name = "looks-ahead"

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return (feature_layer + 1,)


class _Witness(_FirstTokens):
    """Remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Candidates] = []

    def layers(self, feature_layer: int) -> tuple[int, ...]:
        return (1,)

    def select(self, candidates: Candidates) -> Tensor:
        self.seen.append(candidates)
        return super().select(candidates)


class TestPolicies:
    def test_a_policy_of_ones_own_can_be_passed(self, encoder: Encoder, images: list[Partitions]) -> None:
        for tokens in encoder.encode(images, budget=Budget(tokens=5), policy=_FirstTokens()):
            assert places(tokens) == [(0, patch) for patch in range(5)]

    @pytest.mark.parametrize(
        ("policy", "complaint"),
        [
            (_Greedy(), "'greedy' kept 6 tokens of an image; it may keep 1 to 5"),
            (_Idle(), "'idle' kept 0 tokens"),
            (_PaddingLover(), "'padding-lover' kept padding"),
            (_Misshapen(), "'misshapen' must return bool"),
            (_LooksAhead(), "'looks-ahead' reads the layers"),
            ("hierd", "no policy 'hierd'"),
        ],
    )
    def test_broken_promises_are_told(self, encoder: Encoder, policy: str | Policy, complaint: str) -> None:
        padded = partition(picture(100, 60), encoder.tiling)
        with pytest.raises(ConfigurationError, match=complaint):
            encoder.encode([padded], budget=Budget(tokens=5), policy=policy)

    def test_a_policy_sees_the_keys_and_features_of_the_feature_layer(
        self, tower: CLIPVisionModel, encoder: Encoder, images: list[Partitions]
    ) -> None:
        witness = _Witness()
        some = [images[3], images[0]]  # two sub-images, then four
        encoder.encode(some, budget=Budget(tokens=5), policy=witness)
        [seen] = witness.seen
        assert seen.feature_layer == 2
        assert list(seen.cls_attention) == [1]
        assert seen.present[:, :, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
        features, keys = seen.features(), seen.keys()
        for i, image in enumerate(some):
            num = image.grid.num_partitions
            expected = whole(tower, image).hidden_state[:, 1:]
            torch.testing.assert_close(features[i, :num], expected, atol=1e-5, rtol=1e-5)
            [maps] = encoder.cls_attention([image], layers=[1])
            torch.testing.assert_close(seen.cls_attention[1][i, :num], maps[1], atol=1e-6, rtol=1e-5)
            assert keys[i, :num].shape == expected.shape
            for values in (features, keys, seen.cls_attention[1]):
                assert not values[i, num:].any()


class TestMismatches:
    def test_a_tower_of_another_size_than_the_tiling_is_refused(self, tower: CLIPVisionModel) -> None:
        tiling = Tiling(48, 8, (Size(48, 48),))
        with pytest.raises(ModelError, match="32 px in patches of 8 px"):
            Encoder(tower, tiling, feature_layer=-2, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)

    def test_partitions_of_another_size_are_refused(self, encoder: Encoder) -> None:
        other = partition(picture(), Tiling(48, 8, (Size(48, 48),)))
        with pytest.raises(ConfigurationError, match="48 px do not fit a tower for 32 px"):
            encoder.encode([other], budget=Budget(rate=0.2))


@pytest.mark.gpu
def test_a_gpu_keeps_the_same_tokens(encoder: Encoder, images: list[Partitions]) -> None:
    on_gpu = encoder_of(tiny_tower().cuda(), max_patches=12 * 16)  # several batches, one after the other
    for policy in ("hired", "hired-reference", "keep-all"):
        for tokens, others in zip(
            on_gpu.encode(images, budget=Budget(rate=0.2), policy=policy),
            encoder.encode(images, budget=Budget(rate=0.2), policy=policy),
            strict=True,
        ):
            assert tokens.features.device.type == "cpu"
            assert places(tokens) == places(others)
            assert np.allclose(tokens.features, others.features, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["hired", "hired-reference", "keep-all"])
def test_nothing_waits_for_a_gpu_but_the_copy_of_the_results(images: list[Partitions], policy: str) -> None:
    on_gpu = encoder_of(tiny_tower().cuda(), max_patches=12 * 16)
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


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_keeps_the_same_tokens_through_compiled_layers(
    encoder: Encoder, images: list[Partitions]
) -> None:
    compiled = encoder_of(tiny_tower().cuda(), max_patches=32 * 16, compile=True)
    for tokens, others in zip(
        compiled.encode(images, budget=Budget(rate=0.2)),
        encoder.encode(images, budget=Budget(rate=0.2)),
        strict=True,
    ):
        assert places(tokens) == places(others)
        assert np.allclose(tokens.features, others.features, atol=1e-2)


@pytest.mark.parametrize("policy", [name for name in policies.names() if name != "cdpruner"])
def test_many_choices_after_one_look_are_what_each_alone_would_be(
    encoder: Encoder, images: list[Partitions], policy: str
) -> None:
    budgets = [Budget(rate=0.5), Budget(rate=0.1, alpha=0.25), Budget(tokens=7)]
    choices = [(policies.get(policy), budget) for budget in budgets] + [(policies.get("hired"), budgets[0])]
    for (own, budget), found in zip(choices, encoder.encode_each(images, choices), strict=True):
        for one, other in zip(found, encoder.encode(images, budget=budget, policy=own), strict=True):
            assert places(one) == places(other)
            assert one.num_before == other.num_before
            torch.testing.assert_close(one.features, other.features, rtol=2e-3, atol=2e-3)


def test_a_choice_that_reads_a_layer_above_is_refused_after_one_look_too(
    encoder: Encoder, images: list[Partitions]
) -> None:
    high = Hired(final_layer=encoder.feature_layer + 1)
    with pytest.raises(ConfigurationError, match="none above it is run"):
        encoder.encode_each(images, [(high, Budget(rate=0.5))])
