"""Stages that hang, hold the interpreter or lose their engine, for processes that import little else."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.columns import Batch, failures, of_images
from pipeline.config import Config, from_tree
from pipeline.guard import Guarded

OPTIONS: Config = from_tree({"input": "in", "output": "out"})


class EngineDeadError(RuntimeError):
    """As vLLM's is called."""


class Stage:
    name = "generate"

    def __init__(self, _: Any) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        return batch


class Hangs(Stage):
    def __call__(self, batch: Batch) -> Batch:
        if "slow" in batch["key"]:
            time.sleep(3600)
        return batch


class HoldsTheInterpreter(Stage):
    def __call__(self, batch: Batch) -> Batch:
        re.match("(a+)+$", "a" * 60 + "b")
        return batch


class LosesTheAccelerator(Stage):
    def __call__(self, batch: Batch) -> Batch:
        raise torch.AcceleratorError("device-side assert")


class LosesTheEngine(Stage):
    def __call__(self, batch: Batch) -> Batch:
        raise RuntimeError("in a request") from EngineDeadError()


class Dies(Stage):
    """Ends its process on rows that say so."""

    def __call__(self, batch: Batch) -> Batch:
        alive = zip(batch["key"], failures(batch), strict=True)
        if any(key.startswith("deadly") and failure is None for key, failure in alive):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch


def guarded(
    stage: type, calls: list[list[str]], timeout_s: float | None, log_file: Path, locked_after_s: float
) -> None:
    """Run these calls at once, again and again for a second, with stderr in a file."""
    import pipeline.guard

    pipeline.guard.LOCKED_AFTER_S = locked_after_s
    stderr = log_file.open("w")
    os.dup2(stderr.fileno(), 2)
    logging.basicConfig(stream=stderr, force=True)
    worker, until_s = Guarded(stage, OPTIONS, None, timeout_s), time.monotonic() + 1
    while time.monotonic() < until_s:
        threads = [threading.Thread(target=worker, args=[batch(keys)]) for keys in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def batch(keys: list[str]) -> Batch:
    return {"key": np.array(keys, dtype=object)} | of_images([key.encode() for key in keys])
