"""Arms ready to run: their systems loaded, under one memory limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pipeline.benchmark.arms import Arm, System, Work, largest_batch, loaded
from pipeline.benchmark.measure import capped, with_peak_bytes
from pipeline.benchmark.subject import Subject


@dataclass(frozen=True, slots=True)
class Trial:
    """One arm's work, and the most memory it took (None where that can only be reckoned)."""

    work: Work
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One arm on its loaded system."""

    subject: Subject
    arm: Arm
    system: System
    kv_cache_bytes: int

    def trial(self, work: Callable[[System], Work]) -> Trial:
        """Raises OutOfMemoryError, or CapacityError for a prompt that cannot fit."""
        return Trial(*with_peak_bytes(lambda: work(self.system), self.subject.device))

    def run(self, num_images: int, batch: int | None, max_new_tokens: int | None = None) -> Trial:
        """Over the first so many images; without a batch all at once."""
        num_new = max_new_tokens or self.subject.options.max_new_tokens
        return self.trial(
            lambda system: system.run(self.arm, range(num_images), batch, max_new_tokens=num_new)
        )

    def watch(self, num_images: int, batch: int) -> Trial:
        """The same, with the time of every first token."""
        return self.trial(lambda system: system.run_watching(self.arm, range(num_images), batch))

    def memory_bytes(self, trial: Trial, batch: int) -> int:
        """Weights, keys and values of a batch, and on GPUs what the work took besides.

        Keys and values that are set aside beforehand count as far as the batch fills them.
        """
        held = batch * self.subject.sequence_bytes(statistics.mean(trial.work.prompt_tokens))
        if trial.peak_bytes is None:
            return int(self.subject.weight_bytes + held)
        reserved = self.system.reserved_bytes
        return int(trial.peak_bytes - reserved + min(held, reserved))

    def admitted(self, prompt_tokens: float) -> int:
        """How many sequences of this length the keys' and values' memory holds."""
        return largest_batch(self.subject, prompt_tokens, self.kv_cache_bytes)


def groups(subject: Subject, arms: Mapping[str, Arm]) -> list[dict[str, Arm]]:
    """Arms that take turns, their systems loaded together.

    On a GPU each system has the memory to itself, so systems follow one another; so does vLLM everywhere.
    """
    together = [("transformers", "engine"), ("vllm",)]
    alone = [(system,) for systems in together for system in systems]
    return [
        group
        for systems in (alone if subject.device.type == "cuda" else together)
        if (group := {name: arm for name, arm in arms.items() if arm.system in systems})
    ]


@contextmanager
def opened(subject: Subject, arms: Mapping[str, Arm], cap_gib: float | None) -> Iterator[dict[str, Bench]]:
    """A bench for every arm of a group."""
    memory_bytes = subject.memory_bytes(cap_gib)
    options = subject.engine_options(memory_bytes)
    kv_cache_bytes = options.kv_cache_bytes or 0
    with ExitStack() as stack, capped(subject.device, memory_bytes):
        names = dict.fromkeys(arm.system for arm in arms.values())
        systems = {name: stack.enter_context(loaded(name, subject, options)) for name in names}
        yield {name: Bench(subject, arm, systems[arm.system], kv_cache_bytes) for name, arm in arms.items()}
