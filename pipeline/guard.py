"""A stage as workers run it: rows that kill their worker are found out, calls that hang are ended.

Every worker notes beside the driver which rows it has in flight, one call's under one number. A batch that
comes again while its rows are still noted by another worker says that this worker died. Its rows are suspects
from then on and are done one by one, with nothing else in flight. A row that was alone at a death, and has
seen two of them, fails with WorkerDiedError and is not run again; one that comes through is cleared. So each
deadly row costs two deaths at most, and its neighbours none of their answers.

A node that goes twice, the second time just while a suspect is alone, convicts an innocent: its failure is
retryable.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hired.errors import ConfigurationError
from pipeline import metrics
from pipeline.columns import Batch, Failure, failures
from pipeline.config import Config
from pipeline.isolation import WorkerDiedError

MAX_DEATHS = 2
# More in a row, without one row done in between anywhere, are not the rows' fault.
MAX_DEATHS_IN_A_ROW = 50

# A call that holds the interpreter's lock is ended by another watchdog, which needs no interpreter.
LOCKED_AFTER_S = 30.0
EXIT_CODE, STDERR = 70, 2

MAX_KEYS_SHOWN = 8
_ENGINE_IS_DEAD = ("EngineDeadError", "EngineGenerateError")  # of vLLM, which need not be installed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with the rows of a call: go on with some, try ``suspects`` alone, give up ``condemned``."""

    suspects: frozenset[str] = frozenset()
    condemned: frozenset[str] = frozenset()


class Notes(Protocol):
    """Where workers write down what they do; ``Ledger`` is one, and ``Attempts`` another."""

    def begin(
        self, worker: str, call: int, stage: str, keys: Sequence[str], *, alone: bool = False
    ) -> Verdict:
        """The verdict on the rows of a call; those that it lets go on are in flight from now on."""

    def end(self, worker: str, call: int) -> None:
        """The rows of the call are done."""


@dataclass(slots=True)
class _Suspect:
    """What speaks against a row."""

    num_deaths: int = 0
    was_alone: bool = False

    @property
    def is_condemned(self) -> bool:
        return self.was_alone and self.num_deaths >= MAX_DEATHS


class Ledger:
    """The notes of all workers: rows in flight, and rows that were in flight at a death.

    Rows that are done leave it, so it holds no more than what runs, and what died. Knows nothing of Ray.
    """

    def __init__(self) -> None:
        self._in_flight: defaultdict[str, dict[int, tuple[str, frozenset[str]]]] = defaultdict(dict)
        self._suspects: defaultdict[tuple[str, str], _Suspect] = defaultdict(_Suspect)
        self._deaths: Counter[str] = Counter()
        self._deaths_in_a_row: Counter[str] = Counter()

    def deaths(self) -> Mapping[str, int]:
        """Workers that died with rows in flight, by stage."""
        return dict(self._deaths)

    def begin(
        self, worker: str, call: int, stage: str, keys: Sequence[str], *, alone: bool = False
    ) -> Verdict:
        """The verdict on the rows of a call; those that it lets go on are in flight from now on.

        Suspects go on only where the worker says that they are ``alone``. Raises ConfigurationError when the
        stage's workers do nothing but die.
        """
        for dead in self._dead(worker, stage, frozenset(keys)):
            self._bury(dead)
        if self._deaths_in_a_row[stage] >= MAX_DEATHS_IN_A_ROW:
            raise ConfigurationError(
                f"{stage} workers died {MAX_DEATHS_IN_A_ROW} times and finished no row in between, so the "
                "machines or the model are at fault rather than the rows: see the workers' logs"
            )
        seen = {key: self._suspects[stage, key] for key in keys if (stage, key) in self._suspects}
        condemned = frozenset(key for key, suspect in seen.items() if suspect.is_condemned)
        suspects = frozenset() if alone else frozenset(seen) - condemned
        started = frozenset(keys) - condemned - suspects
        if started:
            self._in_flight[worker][call] = stage, started
        return Verdict(suspects, condemned)

    def end(self, worker: str, call: int) -> None:
        """The rows of the call are done, and cleared where they were suspects."""
        stage, keys = self._in_flight[worker].pop(call, ("", frozenset()))
        if not self._in_flight[worker]:
            del self._in_flight[worker]
        self._deaths_in_a_row.pop(stage, None)
        for key in keys:
            self._suspects.pop((stage, key), None)

    def _dead(self, worker: str, stage: str, keys: frozenset[str]) -> list[str]:
        """The other workers that have any of the rows in flight: nobody else would get them."""
        return [
            other
            for other, calls in self._in_flight.items()
            if other != worker
            and any(name == stage and not keys.isdisjoint(noted) for name, noted in calls.values())
        ]

    def _bury(self, worker: str) -> None:
        calls = self._in_flight.pop(worker)
        rows = [(stage, key) for stage, keys in calls.values() for key in sorted(keys)]
        for row in rows:
            self._suspects[row].num_deaths += 1
            self._suspects[row].was_alone |= len(rows) == 1
        stage = rows[0][0]
        self._deaths[stage] += 1
        metrics.worker_died(stage)
        self._deaths_in_a_row[stage] += 1
        log.warning("a %s worker died while it worked on %s", stage, _shown([key for _, key in rows]))
        for row in rows:
            if self._suspects[row].is_condemned:
                log.warning("%s is not tried in %s again: its workers die of it", row[1], row[0])


class _Unnoted:
    """Notes nothing, and suspects nobody."""

    def begin(
        self, worker: str, call: int, stage: str, keys: Sequence[str], *, alone: bool = False
    ) -> Verdict:
        return Verdict()

    def end(self, worker: str, call: int) -> None: ...


class Guarded:
    """A stage with its guard: a batch in, the rows that come of it out, in any order.

    Without ``attempts`` there is the watchdog alone. Calls from several threads run at once, as far as the
    stage allows, but a suspect runs alone. ``batch_timeout_s`` is for one call of the stage.
    """

    def __init__(
        self, stage: type, config: Config, attempts: Notes | None, batch_timeout_s: float | None
    ) -> None:
        self._stage = stage(config)
        self._notes: Notes = _Unnoted() if attempts is None else attempts
        self._watchdog = Watchdog(self.name, batch_timeout_s)
        self._turns = _Turns()
        self._worker = f"{os.getpid()}-{uuid.uuid4().hex}"  # another one after every restart
        self._calls = count()

    @property
    def name(self) -> str:
        """The stage's."""
        return str(self._stage.name)

    def __call__(self, batch: Batch) -> Batch:
        """What the stage makes of the rows; those that killed their workers carry a Failure that says so."""
        keys = [str(key) for key in batch["key"]]
        alive = [key for key, failure in zip(keys, failures(batch), strict=True) if failure is None]
        with self._turns.shared(), self._noted(alive, alone=False) as verdict:
            is_suspect = np.array([key in verdict.suspects for key in keys], bool)
            others = np.flatnonzero(~is_suspect)
            parts = [self._run(batch, others, verdict)] if len(others) or not keys else []
        for row in np.flatnonzero(is_suspect).reshape(-1, 1):
            with self._turns.alone(), self._noted([keys[row[0]]], alone=True) as verdict:
                parts.append(self._run(batch, row, verdict))
        return _joined(parts)

    @contextmanager
    def _noted(self, keys: Sequence[str], *, alone: bool) -> Iterator[Verdict]:
        """Rows that are in flight while the block runs.

        They stay noted when it raises: the job ends then, and if it does not, they are looked at alone.
        """
        if not keys:
            yield Verdict()
            return
        call = next(self._calls)
        yield self._notes.begin(self._worker, call, self.name, keys, alone=alone)
        self._notes.end(self._worker, call)

    def _run(self, batch: Batch, rows: NDArray[np.int64], verdict: Verdict) -> Batch:
        batch = _given_up(_rows(batch, rows), verdict.condemned, self.name)
        keys = [str(key) for key in batch["key"]]
        started_s = time.perf_counter()
        try:
            with self._watchdog.watching(keys):
                result: Batch = self._stage(batch)
        except ConfigurationError:
            raise
        except Exception as error:
            if is_fatal(error):
                end_process(f"{self.name}: the accelerator or its engine failed on {_shown(keys)}")
            raise
        metrics.called(self.name, len(keys), time.perf_counter() - started_s)
        return result


def is_fatal(error: BaseException) -> bool:
    """Whether nothing in this process can be trusted after the error, or after what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.AcceleratorError) or type(cause).__name__ in _ENGINE_IS_DEAD:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def end_process(reason: str) -> None:
    """Say why and where all threads are, and end the process at once, so that it is started again clean."""
    with suppress(Exception):
        log.critical(
            "%s; ending the process, which starts again", reason, exc_info=sys.exc_info()[0] is not None
        )
        logging.shutdown()
    with suppress(Exception):
        faulthandler.dump_traceback(STDERR)
    os._exit(EXIT_CODE)


class Watchdog:
    """Ends the process when a call takes too long; several may run at once. Without a limit none does."""

    def __init__(self, stage: str, timeout_s: float | None) -> None:
        self._stage, self._timeout_s = stage, timeout_s
        self._lock = threading.Lock()
        self._deadlines_s: dict[int, float] = {}
        self._calls = count()

    @contextmanager
    def watching(self, keys: Sequence[str]) -> Iterator[None]:
        """The block ends in time, or the process does."""
        if self._timeout_s is None:
            yield
            return
        timer = threading.Timer(
            self._timeout_s,
            end_process,
            [f"{self._stage} was not done after {self._timeout_s:g} s with {_shown(keys)}"],
        )
        timer.daemon = True
        call = next(self._calls)
        self._set(call, time.monotonic() + self._timeout_s + LOCKED_AFTER_S)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._set(call, None)

    def _set(self, call: int, deadline_s: float | None) -> None:
        """There is one such alarm for the whole process: it goes off for the call that ends first."""
        with self._lock:
            if deadline_s is None:
                self._deadlines_s.pop(call)
            else:
                self._deadlines_s[call] = deadline_s
            faulthandler.cancel_dump_traceback_later()
            if self._deadlines_s:
                remaining_s = min(self._deadlines_s.values()) - time.monotonic()
                faulthandler.dump_traceback_later(max(1e-3, remaining_s), exit=True, file=STDERR)


class _Turns:
    """Either any number of calls together, or one alone, which goes before those that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_together, self._num_waiting, self._is_alone = 0, 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_alone and not self._num_waiting)
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._is_alone and not self._num_together)
            self._num_waiting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()


class Attempts:
    """The ledger of a job in a Ray actor on the driver's node; travels to the workers. Made by ``start``."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls) -> Attempts:
        """A new one; without an end it lives as long as the driver."""
        import ray  # here, as the guard itself does without
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(Ledger).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return cls(actor.remote())

    def close(self) -> None:
        """Lets the actor go, on a cluster that stays."""
        import ray

        ray.kill(self._actor)

    def begin(
        self, worker: str, call: int, stage: str, keys: Sequence[str], *, alone: bool = False
    ) -> Verdict:
        """As ``Ledger.begin``; waits for the answer, so that the rows are noted before they run."""
        import ray

        try:
            verdict: Verdict = ray.get(self._actor.begin.remote(worker, call, stage, list(keys), alone=alone))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigurationError):
                raise error.cause from error
            raise
        return verdict

    def end(self, worker: str, call: int) -> None:
        """As ``Ledger.end``; nobody waits for it, and what this worker says next arrives after it."""
        self._actor.end.remote(worker, call)

    def deaths(self) -> Mapping[str, int]:
        """As ``Ledger.deaths``."""
        import ray

        deaths: Mapping[str, int] = ray.get(self._actor.deaths.remote())
        return deaths


def _given_up(batch: Batch, condemned: frozenset[str], stage: str) -> Batch:
    """The batch with the failures of those rows: the stage passes them over like any other failure."""
    rows = [row for row, key in enumerate(batch["key"]) if str(key) in condemned]
    if not rows:
        return batch
    error = WorkerDiedError(
        f"the {stage} worker died {MAX_DEATHS} times on this row, the last time on it alone"
    )
    columns = {name: batch[name].astype(object) for name in ("stage", "error_type", "error")}
    columns["retryable"] = batch["retryable"].astype(bool)  # a copy, as batches may be read-only
    for name, value in asdict(Failure.of(error, stage)).items():
        columns[name][rows] = value
    return batch | columns


def _rows(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """The rows numbered so; the batch itself if it is all of them."""
    return batch if len(rows) == len(batch["key"]) else {name: batch[name][rows] for name in batch}


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
    return ", ".join(keys[:MAX_KEYS_SHOWN]) + more
