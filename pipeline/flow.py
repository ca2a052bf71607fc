"""Rows of a pass on their way through the stages: how far they run ahead of their commit, and their answers.

work --Feed, held by Brake--> stages under Attempts --> answers --> whoever commits them, and says so
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa
import ray

from pipeline.config import Config
from pipeline.feeding import Feed, start_brake
from pipeline.graph import Stages, answers
from pipeline.guard import Attempts
from pipeline.layout import Layout
from pipeline.resources import Cluster
from pipeline.samples import samples
from pipeline.work import Work


class Flow:
    """A pass under way. Made by ``flowing``."""

    def __init__(self, answers: Iterator[pa.Table], brake: Any) -> None:
        self._answers, self._brake = answers, brake

    @property
    def answers(self) -> Iterator[pa.Table]:
        """Tables of answers in any order, as they are done."""
        # Empty blocks have columns of no type.
        return (table for table in self._answers if table.num_rows)

    def committed(self, piece: int) -> None:
        """Another piece may follow this one."""
        self._brake.committed.remote([piece])

    def stop(self) -> None:
        """No further piece is fed; what is on its way is answered."""
        self._brake.stop.remote()


@contextmanager
def flowing(work: Work, config: Config, cluster: Cluster, stages: Stages) -> Iterator[Flow]:
    """The pass of a settled configuration; what is still on its way when the block ends is dropped."""
    layout = work.inventory.layout
    brake, attempts = start_brake(pieces_on_their_way(config, layout.rows_per_unit)), Attempts.start()
    try:
        feed = Feed(work, brake, block_size(config, layout), samples(layout.num_rows))
        with closing(answers(feed, config, cluster, attempts, stages)) as stream:
            yield Flow(stream, brake)
    finally:
        ray.kill(brake)
        attempts.close()


def pieces_on_their_way(config: Config, rows_per_unit: int) -> int:
    """Units between feeding and commit: thrice what all workers hold, so that none waits for a commit.

    A batch waits until it is full, so there must be more rows on their way than all batches take.
    """
    pools = (config.partition, config.encode, config.generate)
    held = sum((pool.max_actors or 1) * (pool.batch_size or 1) for pool in pools)
    held += (
        (config.generate.max_actors or 1)
        * config.generate.concurrent_calls
        * (config.generate.batch_size or 1)
    )
    return 4 + 3 * -(-held // rows_per_unit)


def block_size(config: Config, layout: Layout) -> int:
    """Rows that travel together: few in a small corpus, so that every worker gets some."""
    share = layout.num_rows // (8 * (config.partition.max_actors or 1))
    return max(4, min(share, layout.rows_per_unit))
