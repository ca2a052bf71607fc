"""The section ``encoder``: what choosing tokens costs beside the plain tower, and beside the published way.

The baseline is transformers' own tower on finished pixels, all layers, its features left on the device. Ours
starts from uint8 on the host and ends with the kept features back on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from hired.budget import Budget
from hired.families.checkpoint import load_weights
from hired.families.llava_next import LlavaNextVisionHalf
from hired.published_encoder import PublishedEncoder
from pipeline.benchmark.arms import load_encoder, parts
from pipeline.benchmark.measure import NOT_MEASURED, digits, interleaved, now, ratio, release, spread
from pipeline.benchmark.subject import Subject

TITLES = {
    "transformers": "the plain tower, by transformers",
    "keep-all": "our encoder, keep-all",
    "hired-20": "our encoder, hired 20 %",
    "published": "the published code's way: all attention maps, dropping after the projector",
}


def measure(subject: Subject) -> dict[str, Any]:
    """Milliseconds an image of every arm, and its share of the measured matrix rate."""
    encoders = _encoders(subject)
    results = interleaved(
        {name: partial(_timed, subject, work) for name, work in encoders.items()}, subject.options.repeats
    )
    num_images = len(subject.partitions)
    num_partitions = sum(image.grid.num_partitions for image in subject.partitions)
    least_s = subject.ceilings.seconds(subject.tower.flops(num_partitions))
    cells: dict[str, Any] = dict.fromkeys(TITLES, NOT_MEASURED)
    for name, seconds in results.items():
        cells[name] = (
            seconds
            if isinstance(seconds, str)
            else {
                "ms_per_image": spread([1000 * taken / num_images for taken in seconds]),
                "roofline_share": spread([least_s / taken for taken in seconds]),
            }
        )
    release()
    plain = _ms(cells["transformers"])
    return {
        "images": num_images,
        "partitions_per_image": digits(num_partitions / num_images),
        "batch": min(subject.options.encode_batch_size, num_images),
        "arms": cells,
        "against_the_plain_tower": {
            name: ratio(_ms(cell), plain) for name, cell in cells.items() if name != "transformers"
        },
    }


def _ms(cell: Any) -> Any:
    return cell["ms_per_image"] if isinstance(cell, dict) else None


def _timed(subject: Subject, encode: Callable[[Sequence[int]], object]) -> float:
    """Seconds for all images, in batches."""
    start = now(subject.device)
    for part in parts(range(len(subject.partitions)), subject.options.encode_batch_size):
        encode(part)
    return now(subject.device) - start


def _encoders(subject: Subject) -> dict[str, Callable[[Sequence[int]], object]]:
    config = subject.config
    tower = load_weights(LlavaNextVisionHalf, subject.path, subject.device, subject.dtype).model.vision_tower
    encoder = load_encoder(subject)
    pixels = [subject.pixel_values(image) for image in subject.partitions]
    mean, std = (values.flatten().tolist() for values in subject.normalisation)

    @torch.no_grad()
    def plain(rows: Sequence[int]) -> object:
        batch = torch.cat([pixels[row] for row in rows]).to(subject.device)
        return tower(batch, output_hidden_states=True).hidden_states[config.vision_feature_layer]

    def kept(encode: Callable[..., object], policy: str, rate: float, rows: Sequence[int]) -> object:
        images = [subject.partitions[row] for row in rows]
        return encode(images, budget=Budget(rate=rate), policy=policy)

    published = PublishedEncoder(
        _eager(tower),
        # Its weights do not matter for what it costs.
        LlavaNextMultiModalProjector(config).to(subject.device, subject.dtype),
        subject.tiling,
        feature_layer=config.vision_feature_layer,
        image_mean=mean,
        image_std=std,
    )
    return {
        "transformers": plain,
        "keep-all": partial(kept, encoder.encode, "keep-all", 1.0),
        "hired-20": partial(kept, encoder.encode, "hired", 0.2),
        "published": partial(kept, published.encode, "hired-reference", 0.2),
    }


def _eager(tower: Any) -> Any:
    """A copy of the tower that gives attention maps."""
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    return eager
