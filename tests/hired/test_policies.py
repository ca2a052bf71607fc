from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hired import policies
from hired.budget import Budget
from hired.errors import ConfigurationError
from hired.geometry import real_patches, sub_image_overlap
from hired.policies import Candidates, Policy
from hired.policies.hired import Hired
from hired.policies.hired_reference import HiredReference
from hired.policies.keep_all import KeepAll
from hired.types import Grid, Size

PER_SIDE, SIDE = 24, 336
PATCHES = PER_SIDE**2
FEATURE_LAYER = 22

SQUARE, GRID = Size(900, 900), Grid(2, 2)
PADDED = Size(450, 900)  # half of the square canvas is padding


def candidates(
    policy: Policy,
    initial: Tensor,
    final: Tensor,
    *,
    original: Size = SQUARE,
    grid: Grid = GRID,
    budget: Budget,
    num_absent: int = 0,
    device: str = "cpu",
) -> Candidates:
    """One image whose CLS attends to ``initial`` ``[k + 1, patches]`` early and to ``final`` late."""
    real = real_patches(original, grid, PER_SIDE)

    def filled_up(partitions: Tensor) -> Tensor:
        absent = partitions.new_zeros(num_absent, PATCHES)
        return torch.cat([partitions, absent])[None].to(device)

    return Candidates(
        present=filled_up(torch.ones_like(real)),
        real=filled_up(real),
        overlap=filled_up(sub_image_overlap(original, grid, PER_SIDE, SIDE)),
        num_tokens=torch.tensor([policy.num_tokens(budget, real)], device=device),
        max_tokens=policy.num_tokens(budget, real),
        max_share=PATCHES,
        alpha=budget.alpha,
        feature_layer=FEATURE_LAYER,
        cls_attention={0: filled_up(initial), FEATURE_LAYER: filled_up(final)},
        keys=lambda: pytest.fail("nobody asked for keys"),
        features=lambda: pytest.fail("nobody asked for features"),
        single_head=lambda _: pytest.fail("nobody asked for one head"),
        by_head=lambda _: pytest.fail("nobody asked for heads"),
        fingerprints=lambda: pytest.fail("nobody asked for fingerprints"),
    )


def noise(num_partitions: int = 5) -> Tensor:
    return torch.rand(num_partitions, PATCHES, generator=torch.Generator().manual_seed(0))


def looking_right(num_partitions: int = 5) -> Tensor:
    """CLS attends to the right half of everything, and there a little more to the top."""
    row, col = torch.arange(PATCHES) // PER_SIDE, torch.arange(PATCHES) % PER_SIDE
    return ((col >= PER_SIDE // 2) * (1 + (PER_SIDE - row) * 1e-6)).expand(num_partitions, -1)


def select(policy: Policy, seen: Candidates) -> Tensor:
    keep = policy.select(seen)
    assert isinstance(keep, Tensor)  # merges nothing
    return keep


def counts(policy: Policy, seen: Candidates) -> list[int]:
    per_partition: list[int] = select(policy, seen)[0].sum(-1).tolist()
    return per_partition


class TestRegistry:
    def test_it_names_the_policies(self) -> None:
        assert policies.names() == (
            "cdpruner", "divprune", "grid", "hired", "hired-reference", "hired-scope", "hired-spread",
            "keep-all", "pool", "prumerge", "prumerge+", "random", "scope", "thumbnail", "visionzip",
        )  # fmt: skip

    @pytest.mark.parametrize("name", [name for name in policies.names() if name != "cdpruner"])
    def test_a_policy_carries_the_name_it_is_found_by(self, name: str) -> None:
        assert policies.get(name).name == name

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"'hierd'.*hired, hired-reference, hired-scope, hired-spread, keep-all"
        ):
            policies.get("hierd")

    def test_a_registered_policy_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policies, "_REGISTRY", dict(policies._REGISTRY))
        policies.register("mine", KeepAll)
        policies.register("by-path", "hired.policies.keep_all:KeepAll")
        assert isinstance(policies.get("mine"), KeepAll)
        assert isinstance(policies.get("by-path"), KeepAll)
        assert "mine" in policies.names()

    def test_a_name_cannot_be_taken_from_another_policy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policies, "_REGISTRY", dict(policies._REGISTRY))
        with pytest.raises(ConfigurationError, match="'hired' belongs to another"):
            policies.register("hired", KeepAll)
        policies.register("mine", KeepAll)
        policies.register("mine", KeepAll)  # the same again does no harm

    def test_a_policy_is_imported_when_it_is_asked_for(self) -> None:
        check = (
            "import sys, hired.policies as p; lazy = 'hired.policies.keep_all' not in sys.modules; "
            "p.get('keep-all'); print(lazy, 'hired.policies.keep_all' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["True", "True"]


PACKAGE = """
from hired.policies.keep_all import KeepAll

class Theirs(KeepAll):
    name = "theirs"

def not_a_policy():
    return 7
"""

ENTRY_POINTS = """
[hired.policies]
theirs = their_policies:Theirs
seven = their_policies:not_a_policy
missing = their_policies:Missing
unwritten = their_unwritten_module:Theirs
hired = their_policies:Theirs
"""


class TestEntryPoints:
    """A package of somebody else's, as pip would install it."""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "their_policies.py").write_text(PACKAGE)
        metadata = tmp_path / "their_policies-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-policies\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
        monkeypatch.syspath_prepend(tmp_path)
        policies._installed.cache_clear()
        yield
        policies._installed.cache_clear()
        sys.modules.pop("their_policies", None)

    def test_its_policy_is_known_and_imported_when_it_is_asked_for(self) -> None:
        assert "theirs" in policies.names()
        assert "their_policies" not in sys.modules
        assert policies.get("theirs").name == "theirs"

    def test_a_name_that_is_taken_stays_whose_it_was(self) -> None:
        assert isinstance(policies.get("hired"), Hired)
        assert policies.names().count("hired") == 1

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("seven", "'seven' of their-policies, makes a int; it must be a subclass"),
            ("missing", "'missing' of their-policies cannot be had.*AttributeError.*mend or uninstall"),
            ("unwritten", "'unwritten' of their-policies cannot be had.*ModuleNotFoundError"),
        ],
    )
    def test_what_a_package_fails_to_give_is_told_with_its_name(self, name: str, complaint: str) -> None:
        with pytest.raises(ConfigurationError, match=complaint):
            policies.get(name)


@pytest.mark.parametrize("name", ["hired", "hired-reference", "keep-all"])
class TestEveryPolicy:
    def test_keeps_real_patches_within_its_limit_whoever_shares_the_batch(self, name: str) -> None:
        policy = policies.get(name)
        for original in (SQUARE, PADDED):
            alone = candidates(policy, noise(), noise(), original=original, budget=Budget(rate=0.2))
            filled_up = candidates(
                policy, noise(), noise(), original=original, budget=Budget(rate=0.2), num_absent=2
            )
            keep = select(policy, alone)
            assert not (keep & ~alone.real).any()
            assert 0 < int(keep.sum()) <= int(alone.num_tokens)
            assert select(policy, filled_up)[:, :5].equal(keep)
            assert not select(policy, filled_up)[:, 5:].any()

    def test_never_waits_for_the_device(self, name: str) -> None:
        """On the meta device there are no values to wait for, and asking for one is an error."""
        policy = policies.get(name)
        seen = candidates(policy, noise(), noise(), budget=Budget(rate=0.2), device="meta")
        keep = select(policy, seen)
        assert keep.shape == seen.real.shape
        assert keep.dtype == torch.bool


class TestHired:
    def test_sub_images_get_tokens_by_what_lies_where_they_lie(self) -> None:
        seen = candidates(Hired(), looking_right(), noise(), budget=Budget(rate=0.2))
        assert counts(Hired(), seen) == [288, 0, 144, 0, 144]

    def test_the_budget_counts_real_tokens(self) -> None:
        seen = candidates(Hired(), noise(), noise(), original=PADDED, budget=Budget(rate=0.2))
        num_real = int(seen.real.sum())
        assert num_real == 576 * 3
        assert sum(counts(Hired(), seen)) == num_real // 5

    def test_its_layers_can_be_chosen(self) -> None:
        assert Hired().layers(FEATURE_LAYER) == (0, FEATURE_LAYER)
        swapped = Hired(initial_layer=FEATURE_LAYER, final_layer=0)
        assert swapped.layers(FEATURE_LAYER) == (FEATURE_LAYER, 0)
        seen = candidates(swapped, noise(), looking_right(), budget=Budget(rate=0.2))
        assert counts(swapped, seen) == [288, 0, 144, 0, 144]


class TestHiredReference:
    def test_sub_images_get_tokens_by_bands_of_rows(self) -> None:
        """What the published code answers where the paper says 0, 144, 0, 144."""
        seen = candidates(HiredReference(), looking_right(), noise(), budget=Budget(rate=0.2))
        assert counts(HiredReference(), seen) == [288, 72, 72, 72, 72]

    def test_it_counts_patches_and_not_their_attention(self) -> None:
        initial = torch.zeros(5, PATCHES)
        initial[0, : PATCHES // 4] = 1000.0  # the first band, all of it
        initial[0, PATCHES // 4 : PATCHES // 2] = 1.0  # the second
        seen = candidates(HiredReference(), initial, noise(), budget=Budget(rate=0.2))
        assert counts(HiredReference(), seen) == [288, 144, 144, 0, 0]

    def test_alpha_also_decides_how_many_patches_are_counted(self) -> None:
        initial = (PATCHES - torch.arange(PATCHES)).float().expand(5, -1)  # the first rows most
        seen = candidates(HiredReference(), initial, noise(), budget=Budget(rate=0.2, alpha=0.75))
        assert counts(HiredReference(), seen) == [432, 144, 0, 0, 0]

    def test_what_the_full_image_has_no_room_for_goes_to_the_sub_images(self) -> None:
        initial = (torch.arange(PATCHES) % 2 == 0).float().expand(5, -1)  # as many in every band
        seen = candidates(HiredReference(), initial, noise(), budget=Budget(rate=0.6))
        assert counts(HiredReference(), seen) == [576, 288, 288, 288, 288]

    def test_what_limits_leave_over_is_lost(self) -> None:
        initial = (PATCHES - torch.arange(PATCHES)).float().expand(5, -1)
        seen = candidates(HiredReference(), initial, noise(), budget=Budget(rate=0.8, alpha=0.75))
        assert counts(HiredReference(), seen) == [576, 576, 0, 0, 0]

    def test_what_floors_leave_over_is_lost(self) -> None:
        initial = (torch.arange(PATCHES) % 2 == 0).float().expand(5, -1)  # as many in every band
        seen = candidates(HiredReference(), initial, noise(), budget=Budget(tokens=13))
        assert counts(HiredReference(), seen) == [6, 1, 1, 1, 1]

    def test_padding_is_chosen_and_lost(self) -> None:
        seen = candidates(
            HiredReference(), looking_right(), noise(), original=PADDED, budget=Budget(rate=0.2)
        )
        assert int(seen.num_tokens) == 576  # of 2880, padding included
        full_image, *sub_images = counts(HiredReference(), seen)
        assert full_image == 288
        assert all(count < 72 for count in sub_images)

    def test_alpha_one_leaves_nothing_to_the_sub_images(self) -> None:
        seen = candidates(HiredReference(), noise(), noise(), budget=Budget(rate=0.5, alpha=1.0))
        assert counts(HiredReference(), seen) == [576, 0, 0, 0, 0]

    def test_at_least_the_patch_most_attended_in_the_full_image_remains(self) -> None:
        seen = candidates(HiredReference(), noise(), noise(), budget=Budget(tokens=1))
        keep = select(HiredReference(), seen)
        assert keep.nonzero().tolist() == [[0, 0, int(noise()[0].argmax())]]

    def test_bands_may_cut_rows_where_patches_do_not_divide_evenly(self) -> None:
        grid, original = Grid(1, 5), Size(336, 1680)
        initial = noise(6)
        seen = candidates(
            HiredReference(), initial, noise(6), original=original, grid=grid, budget=Budget(rate=0.1)
        )
        top = initial[0].argsort(descending=True)[: PATCHES // 2]
        in_band = torch.bincount(top * 5 // PATCHES, minlength=5)
        num_sub_images = 345 - 172  # a tenth of 6 * 576, less half of it
        assert counts(HiredReference(), seen) == [172, *(in_band * num_sub_images // in_band.sum()).tolist()]


class TestKeepAll:
    def test_it_keeps_every_real_patch_whatever_the_budget(self) -> None:
        seen = candidates(KeepAll(), noise(), noise(), original=PADDED, budget=Budget(tokens=1))
        assert select(KeepAll(), seen).equal(seen.real)

    def test_it_reads_no_attention(self) -> None:
        assert KeepAll().layers(FEATURE_LAYER) == ()
