"""A run without Ray: an inventory of made-up rows, and answers as the generating stage makes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.inventory import Inventory, take_inventory
from pipeline.layout import Layout
from pipeline.publishing import Publisher
from pipeline.questions import Question, Questionnaire
from pipeline.reading import ReadOptions
from pipeline.rows import Item, to_table
from pipeline.sinks import sinks
from pipeline.storage import Store


def rows(count: int, **carried: Any) -> pa.Table:
    """Rows ``r0``, ``r1``, ... and the columns that they carry."""
    table = to_table(Item(f"r{number}", f"r{number}.jpg", f"/in/r{number}.jpg") for number in range(count))
    for name, values in carried.items():
        table = table.append_column(name, pa.array(values))
    return table


def inventory(folder: Path, count: int, *, per_unit: int = 3, per_file: int = 6, **carried: Any) -> Inventory:
    return take_inventory(
        Store(folder), [rows(count, **carried)], lambda number: Layout.of(number, per_unit, per_file)
    )


def questionnaire(*prompts: str) -> Questionnaire:
    return Questionnaire(
        [
            Question(number, f"q{number}", prompt, 4, 0.0, 1.0, 0, ())
            for number, prompt in enumerate(prompts or ("What?",))
        ]
    )


def publisher(taken: Inventory, asked: Questionnaire, *formats: str, keep: tuple[str, ...] = ()) -> Publisher:
    return Publisher(
        inventory=taken,
        questionnaire=asked,
        sinks=sinks(formats, keep_images=False),
        keep_columns=keep,
        constants={"model": "m", "policy": "hired", "run_id": "run"},
        reading=ReadOptions(),
    )


def answers(
    slots: Iterable[int], num_questions: int = 1, *, failed: Iterable[int] = (), said: str = "yes"
) -> pa.Table:
    """Answers with these slots; those in ``failed`` are failures that may be tried again."""
    numbers, lost = list(slots), set(failed)
    index = [slot // num_questions for slot in numbers]
    bad = [slot in lost for slot in numbers]
    good = [0 if each else 1 for each in bad]
    columns: dict[str, Any] = {
        "index": pa.array(index, pa.int64()),
        "question": pa.array([slot % num_questions for slot in numbers], pa.int32()),
        "key": [f"r{row}" for row in index],
        "path": [f"r{row}.jpg" for row in index],
        "prompt": ["What?"] * len(numbers),
        "kept": [""] * len(numbers),
        "width": pa.array(np.array(good) * 40, pa.int32()),
        "height": pa.array(np.array(good) * 30, pa.int32()),
        "caption": [said * each for each in good],
        "finish_reason": ["stop" * each for each in good],
        "prompt_tokens": pa.array(np.array(good) * 20, pa.int32()),
        "visual_tokens_full": pa.array(np.array(good) * 100, pa.int32()),
        "visual_tokens_kept": pa.array(np.array(good) * 20, pa.int32()),
        "completion_tokens": pa.array(np.array(good) * 2, pa.int32()),
        "stage": ["read" * each for each in bad],
        "error_type": ["OSError" * each for each in bad],
        "error": ["gone" * each for each in bad],
        "retryable": bad,
        "read_s": [0.5] * len(numbers),
        "read_peak_rss_bytes": pa.array([1000] * len(numbers), pa.int64()),
    }
    return pa.table(columns)
