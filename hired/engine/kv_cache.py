"""The key-value memory: one arena of token places, and the extents of it that sequences hold.

A sequence gets one contiguous extent, as long as its prompt and its longest possible answer, when it is
admitted, and gives it back when it ends. So memory never runs out in the middle of an answer, nothing is
moved, and attention reads each sequence's keys and values in place.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hired.engine.decoder import Shape

# Extents of like capacity side by side can share one attention call where the kernel needs even strides.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Extent:
    """Places ``start`` to ``start + capacity``."""

    start: int
    capacity: int


class Arena:
    """Hands out extents of a row of places, first fit; ends of freed neighbours grow together."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._free: list[tuple[int, int]] = [(0, num_places)]  # start and length, sorted
        self._held: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._free)

    @property
    def num_held(self) -> int:
        """Extents that are handed out."""
        return len(self._held)

    def allocate(self, num_tokens: int) -> Extent | None:
        """An extent for ``num_tokens`` tokens and few more, None if there is no room at the moment."""
        rounded = -(-num_tokens // ALIGNMENT) * ALIGNMENT
        return self._first_fit(rounded) or self._first_fit(num_tokens)

    def _first_fit(self, capacity: int) -> Extent | None:
        for i, (start, length) in enumerate(self._free):
            if length >= capacity:
                rest = [(start + capacity, length - capacity)] if length > capacity else []
                self._free[i : i + 1] = rest
                self._held[start] = capacity
                return Extent(start, capacity)
        return None

    def free(self, extent: Extent) -> None:
        """Take an extent back."""
        start, length = extent.start, self._held.pop(extent.start)
        at = bisect.bisect(self._free, (start, 0))
        if at < len(self._free) and self._free[at][0] == start + length:
            length += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start, length = self._free[at][0], length + self._free.pop(at)[1]
        self._free.insert(at, (start, length))


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part in a pass: ``num_new`` tokens join ``num_cached`` ones in its extent."""

    extent: Extent
    num_cached: int
    num_new: int

    @property
    def start(self) -> int:
        return self.extent.start

    @property
    def capacity(self) -> int:
        return self.extent.capacity

    @property
    def num_after(self) -> int:
        return self.num_cached + self.num_new


class KVCache:
    """Keys and values of all layers, each ``[places, kv_heads, head_dim]``."""

    def __init__(self, shape: Shape, num_places: int, device: torch.device) -> None:
        self.shape, self.num_places, self.device = shape, num_places, device
        self.arena = Arena(num_places)
        size = (shape.num_layers, num_places, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = (_zeros(size, shape.dtype, device) for _ in range(2))

    @property
    def num_bytes(self) -> int:
        return self.num_places * self.shape.kv_bytes_per_token

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts ``[n, kv_heads, head_dim]`` to the ``places`` int64 ``[n]``."""
        self.keys[layer].index_copy_(0, places, keys)
        self.values[layer].index_copy_(0, places, values)

    def read(self, start: int, num_tokens: int) -> Tensor:
        """A copy of what all layers hold there: ``[2, layers, num_tokens, kv_heads, head_dim]``."""
        there = slice(start, start + num_tokens)
        return torch.stack([self.keys[:, there], self.values[:, there]])

    def put(self, start: int, held: Tensor) -> None:
        """Writes what ``read`` gave to another place."""
        there = slice(start, start + held.shape[2])
        self.keys[:, there], self.values[:, there] = held

    def clear(self, extent: Extent) -> None:
        """Overwrites what may not be a number: a kernel that masks places still multiplies them by zero."""
        there = slice(extent.start, extent.start + extent.capacity)
        self.keys[:, there] = 0
        self.values[:, there] = 0


def places_of(segments: Sequence[Segment]) -> Tensor:
    """Where the new tokens of all segments go: int64 ``[n]``, on the host."""
    if all(segment.num_new == 1 for segment in segments):
        return torch.tensor([segment.start + segment.num_cached for segment in segments])
    spans = [np.arange(s.start + s.num_cached, s.start + s.num_after) for s in segments]
    return torch.from_numpy(np.concatenate(spans))


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages the operating system commits when they are first written, on the host."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*size[:-1], size[-1] * dtype.itemsize), np.uint8)).view(dtype)
