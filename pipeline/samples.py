"""Rows drawn evenly from a run: a few to show in the report, some more to measure the stages on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from hired import families
from hired.errors import ImageError
from hired.geometry import Tiling
from hired.partitioning import partition
from hired.types import Partitions
from hired.vlm import resolve
from pipeline.columns import Batch, Failure
from pipeline.config import Config
from pipeline.gallery import GallerySample
from pipeline.opening import Run
from pipeline.publishing import GALLERY
from pipeline.reading import read
from pipeline.rows import to_items
from pipeline.stages import ReadStage
from pipeline.work import UnitWork, fed

NUM_SHOWN = 12
NUM_MEASURED = 256
ROWS_PER_READ = 16

log = logging.getLogger(__name__)


def samples(num_rows: int, count: int = NUM_SHOWN) -> frozenset[int]:
    """The numbers of rows, evenly spread from first to last."""
    return frozenset(np.linspace(0, num_rows - 1, min(count, num_rows)).astype(int).tolist())


def sampled_batches(config: Config, run: Run) -> Iterator[Batch]:
    """Rows with their bytes and questions, as the reading stage hands them on."""
    stage = ReadStage(config)
    layout = run.inventory.layout
    work = UnitWork(run.inventory, run.questionnaire, [range(layout.num_units)])
    rows = []
    for number in sorted(samples(layout.num_rows, NUM_MEASURED)):
        unit = number // layout.rows_per_unit
        [block] = fed(work, unit, layout.rows_per_unit, frozenset())
        rows.append(block.slice(number - layout.unit_rows(unit).start, 1))
    for start in range(0, len(rows), ROWS_PER_READ):
        yield from stage(pa.concat_tables(rows[start : start + ROWS_PER_READ]))


def gallery(config: Config, run: Run) -> list[GallerySample]:
    """Those of the samples that became captions, with the tokens that were kept."""
    tiling = families.tiling(resolve(config.model))
    shown = []
    for name in run.store.list(GALLERY):
        answer = json.loads(run.store.read(name))
        partitions = _partitions(config, run, answer["index"], tiling)
        if isinstance(partitions, str):
            log.warning("%s cannot be shown in the report: %s", answer["key"], partitions)
            continue
        kept = np.zeros((len(partitions.pixels), tiling.patches_per_side**2), dtype=bool)
        tokens = json.loads(answer["kept"])
        kept[tokens["partition"], tokens["patch"]] = True
        shown.append(GallerySample(answer["key"], answer["prompt"], answer["caption"], partitions, kept))
    return shown


def _partitions(config: Config, run: Run, index: int, tiling: Tiling) -> Partitions | str:
    """Those of a row whose image could be partitioned before, or what is wrong with it now."""
    row = run.inventory.rows(range(index, index + 1))
    image = next(read(list(to_items(row)), config.reading))
    if isinstance(image, Failure):
        return image.error
    try:
        return partition(image, tiling, max_pixels=config.max_pixels, reduced=config.reduced_decoding)
    except ImageError as error:
        return str(error)
