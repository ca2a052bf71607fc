"""Who asks a worker's model: with tokens dropped before the language model, or, for comparison, inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import torch

import hired
from hired.budget import Budget
from hired.engine import EngineOptions
from hired.evaluation import fastv
from hired.evaluation.answering import Respondent
from hired.evaluation.arms import Arm
from hired.evaluation.fastv import FastV
from hired.evaluation.items import Item, Picture
from hired.evaluation.scoring import score

# On CPUs: some hundred sequences of a small model, in memory that stays in use. GPUs take what is free.
CPU_CACHE_BYTES = 512 * 2**20

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("picture", pa.string()),
        ("arm", pa.string()),
        ("rate", pa.float64()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.int32()),
        ("newlines", pa.int32()),
    ]
)

AnyArm: TypeAlias = Arm | FastV


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker loads, and how many of them there are."""

    model: str
    checkpoint: Path
    device: str
    dtype: str | None
    threads: int
    actors: int

    def load(self) -> hired.VLM:
        """The model, with a KV cache for many short answers."""
        engine = EngineOptions(kv_cache_bytes=CPU_CACHE_BYTES if self.device == "cpu" else None)
        return hired.load(self.checkpoint, device=self.device, dtype=self.dtype, engine=engine)


class Asker(Protocol):
    """Asks all arms the questions about a chunk of pictures; one an actor."""

    def __init__(self, worker: Worker, arms: Sequence[Any]) -> None: ...

    def answers(self, pictures: Sequence[Picture]) -> pa.Table:
        """One row an item and arm."""


class PolicyAsker:
    """Tokens are dropped before the language model."""

    def __init__(self, worker: Worker, arms: Sequence[Arm]) -> None:
        torch.set_num_threads(worker.threads)
        self._vlm = worker.load()
        self._respondent = Respondent(self._vlm.encoder, self._vlm.generator)
        self._arms = arms

    def answers(self, pictures: Sequence[Picture]) -> pa.Table:
        """See Asker; the tower looks at each picture once."""
        seen = [(self._vlm.partition(picture.data), picture.items) for picture in pictures]
        rows = [
            _row(answer.item, answer.arm, answer.text, answer.num_tokens, answer.num_newlines)
            for answer in self._respondent.answers(seen, self._arms)
        ]
        return pa.Table.from_pylist(rows, SCHEMA)


class FastVAsker:
    """Tokens are dropped inside the language model. Newlines are among the tokens of a row."""

    def __init__(self, worker: Worker, arms: Sequence[FastV]) -> None:
        torch.set_num_threads(worker.threads)
        self._vlm = worker.load()
        self._arms = arms

    def answers(self, pictures: Sequence[Picture]) -> pa.Table:
        """See Asker; every question is prefilled with all tokens of its picture."""
        partitions = [self._vlm.partition(picture.data) for picture in pictures]
        kept = self._vlm.encode(partitions, budget=Budget(rate=1.0), policy="keep-all")
        asked = [
            (tokens, item) for tokens, picture in zip(kept, pictures, strict=True) for item in picture.items
        ]
        rows = []
        for arm in self._arms:
            captions = fastv.generate(
                self._vlm,
                [tokens for tokens, _ in asked],
                [item.question for _, item in asked],
                arm.budget,
                max_new_tokens=[item.max_new_tokens for _, item in asked],
                num_full_layers=arm.num_full_layers,
            )
            rows += [
                _row(item, arm, caption.text, caption.visual_tokens_kept, 0)
                for (_, item), caption in zip(asked, captions, strict=True)
            ]
        return pa.Table.from_pylist(rows, SCHEMA)


def _row(item: Item, arm: AnyArm, text: str, num_tokens: int, num_newlines: int) -> dict[str, Any]:
    return {
        "key": item.key,
        "task": item.task,
        "picture": item.picture,
        "arm": arm.name,
        "rate": arm.budget.rate,
        "answer": text,
        "score": score(item.metric, text, item.answers),
        "tokens": num_tokens,
        "newlines": num_newlines,
    }
