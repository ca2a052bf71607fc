"""The arena: extents never overlap, nothing is lost, and freed room is found again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hired.engine.kv_cache import ALIGNMENT, Arena, Extent

PLACES = 20 * ALIGNMENT + 13


class Allocations(RuleBasedStateMachine):
    """Any order of taking and giving back."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(PLACES)
        self.held: list[Extent] = []

    @rule(target=extents, num_tokens=st.integers(1, PLACES))
    def allocate(self, num_tokens: int) -> Extent | None:
        extent = self.arena.allocate(num_tokens)
        if extent is None:
            # Not even a gap of exactly this length: the widest between neighbours is smaller.
            ends = [0, *sorted(e.start + e.capacity for e in self.held)]
            starts = [*sorted(e.start for e in self.held), PLACES]
            assert max(start - end for start, end in zip(starts, ends, strict=True)) < num_tokens
            return None
        assert num_tokens <= extent.capacity < num_tokens + ALIGNMENT
        self.held.append(extent)
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent | None) -> None:
        if extent is not None:
            self.arena.free(extent)
            self.held.remove(extent)

    @invariant()
    def extents_lie_apart_and_inside(self) -> None:
        held = sorted(self.held, key=lambda extent: extent.start)
        bounds = [0, *(bound for e in held for bound in (e.start, e.start + e.capacity)), PLACES]
        assert bounds == sorted(bounds)

    @invariant()
    def every_place_is_free_or_held(self) -> None:
        assert self.arena.num_free + sum(extent.capacity for extent in self.held) == PLACES
        assert self.arena.num_held == len(self.held)


TestAllocations = Allocations.TestCase


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_after_all_is_given_back_the_whole_is_one_extent_again(sizes: list[int]) -> None:
    arena = Arena(PLACES)
    extents = [extent for size in sizes if (extent := arena.allocate(size))]
    for extent in sorted(extents, key=lambda extent: extent.start % 7):
        arena.free(extent)
    assert arena.allocate(PLACES) == Extent(0, PLACES)


def test_what_fits_exactly_is_not_refused_for_rounding() -> None:
    assert Arena(ALIGNMENT + 1).allocate(ALIGNMENT + 1) == Extent(0, ALIGNMENT + 1)
