"""Copies between host and device: all arrive, unmixed, whatever is under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hired.batches import batches
from hired.devices import sent
from hired.geometry import Tiling
from hired.transfer import on_device, on_host
from hired.types import Box, Grid, Partitions, Size

TILING = Tiling(8, 4, (Size(8, 8),))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def images(number: int) -> list[Partitions]:
    pixels = np.random.default_rng(0).integers(0, 256, (number, 2, 8, 8, 3), dtype=np.uint8)
    return [Partitions(own, Grid(1, 1), Box(0, 0, 8, 8), Size(8, 8)) for own in pixels]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_batches_arrive_in_order_and_whole(device: str, number: int) -> None:
    sums, expected = [], []
    for batch, copy in on_device(batches(images(number), TILING, 2), torch.device(device)):
        assert copy.pixels.device.type == copy.overlap.device.type == device
        assert batch.pixels.device.type == "cpu"
        assert copy.images == batch.images
        sums.append(copy.pixels.double().sum((1, 2, 3)))
        expected.append(batch.pixels.double().sum((1, 2, 3)))
    assert len(sums) == number
    for back, own in zip(on_host(sums), expected, strict=True):
        assert back.equal(own)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_comes_back(device: str) -> None:
    tensors = [torch.arange(6).view(2, 3), torch.zeros(0, 4), torch.tensor([True, False])]
    there = [sent(tensor, torch.device(device)) for tensor in tensors]
    for back, tensor in zip(on_host(there), tensors, strict=True):
        assert back.device.type == "cpu"
        assert back.equal(tensor)


def test_nothing_to_copy_is_fine() -> None:
    assert on_host([]) == []
