"""The guard of a stage: deadly rows are found out and let go, hanging calls end, neighbours are answered."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hired.errors import ConfigurationError
from pipeline import columns
from pipeline.columns import Batch, Failure
from pipeline.config import Config, from_tree
from pipeline.guard import EXIT_CODE, MAX_DEATHS_IN_A_ROW, Attempts, Guarded, Ledger, Verdict, is_fatal
from pipeline.questions import Question, to_json
from pipeline.stages import EncodeStage, GenerateStage, PartitionStage
from tests.pictures import picture, saved
from tests.pipeline import hostile_stages


def config(**options: Any) -> Config:
    return from_tree({"input": "in", "output": "out", **options})


OPTIONS = config()


class Died(BaseException):
    """Stands for the end of a process: nothing after it runs, and no error is seen."""


def batch(keys: Sequence[str], failed: Collection[str] = ()) -> Batch:
    rows = [Failure("read", "OSError", "gone", False) if key in failed else key.encode() for key in keys]
    return {"key": np.array(list(keys), dtype=object)} | columns.of_images(rows)


class Echo:
    """Answers every row by its key; dies of some. Its class counts what it was given."""

    name = "encode"
    deadly: ClassVar[Collection[str]] = ()
    calls: ClassVar[list[list[str]]] = []

    def __init__(self, _: Any) -> None:
        pass

    def __call__(self, rows: Batch) -> Batch:
        alive = [key for key, failure in _outcomes(rows) if failure is None]
        self.calls.append(alive)
        if not set(alive).isdisjoint(self.deadly):
            raise Died
        return rows | {"answer": np.array([f"<{key}>" for key in rows["key"]], dtype=object)}


@pytest.fixture
def echo() -> type[Echo]:
    return _echo()


def _echo(deadly: Collection[str] = ()) -> type[Echo]:
    return type("Echo", (Echo,), {"deadly": deadly, "calls": []})


def _outcomes(rows: Batch) -> list[tuple[str, Failure | None]]:
    return list(zip(map(str, rows["key"]), columns.failures(rows), strict=True))


def run(stage: type[Echo], ledger: Ledger, batches: Iterable[Batch]) -> tuple[list[Batch], int]:
    """What Ray does with an actor: every batch is run until it comes through. The results, and the deaths."""
    worker, results, num_deaths = Guarded(stage, OPTIONS, ledger, None), [], 0
    for rows in batches:
        while True:
            try:
                results.append(worker(rows))
                break
            except Died:
                num_deaths += 1
                assert num_deaths < 200, "dies for ever"
                worker = Guarded(stage, OPTIONS, ledger, None)
    return results, num_deaths


def outcomes(results: Iterable[Batch]) -> dict[str, str]:
    """What became of every row; fails if any is there twice."""
    ends: dict[str, str] = {}
    for rows in results:
        for key, failure in _outcomes(rows):
            assert key not in ends
            ends[key] = failure.error_type if failure else "done"
    return ends


# Deadly rows


def test_rows_that_harm_nobody_run_in_one_call_and_leave_nothing_behind(echo: type[Echo]) -> None:
    ledger = Ledger()
    results, num_deaths = run(echo, ledger, [batch("abc"), batch("de")])
    assert outcomes(results) == dict.fromkeys("abcde", "done")
    assert results[0]["answer"].tolist() == ["<a>", "<b>", "<c>"]
    assert (num_deaths, echo.calls) == (0, [["a", "b", "c"], ["d", "e"]])
    assert not ledger._in_flight
    assert not ledger._suspects


def test_a_deadly_row_is_given_up_after_two_deaths_and_its_neighbours_are_done() -> None:
    stage, ledger = _echo("b"), Ledger()
    results, num_deaths = run(stage, ledger, [batch("abc"), batch("def")])
    assert outcomes(results) == dict.fromkeys("acdef", "done") | {"b": "WorkerDiedError"}
    assert num_deaths == 2
    assert ledger.deaths() == {"encode": 2}
    assert stage.calls == [["a", "b", "c"], ["a"], ["b"], ["a"], ["c"], ["d", "e", "f"]]


def test_two_deadly_rows_in_one_batch_cost_three_deaths() -> None:
    stage = _echo("bd")
    results, num_deaths = run(stage, Ledger(), [batch("abcde")])
    assert outcomes(results) == dict.fromkeys("ace", "done") | dict.fromkeys("bd", "WorkerDiedError")
    assert num_deaths == 3


def test_a_row_that_comes_alone_is_tried_twice_as_well() -> None:
    stage = _echo("a")
    results, num_deaths = run(stage, Ledger(), [batch("a")])
    assert outcomes(results) == {"a": "WorkerDiedError"}
    assert (num_deaths, stage.calls) == (2, [["a"], ["a"], []])


def test_a_worker_that_dies_by_chance_costs_no_row() -> None:
    stage, ledger = _echo("abc"), Ledger()
    with pytest.raises(Died):
        Guarded(stage, OPTIONS, ledger, None)(batch("abc"))
    stage.deadly = ()
    results, _ = run(stage, ledger, [batch("abc")])
    assert outcomes(results) == dict.fromkeys("abc", "done")
    assert not ledger._suspects


def test_a_worker_that_dies_by_chance_again_and_again_costs_no_row_that_was_not_alone() -> None:
    stage, ledger = _echo(), Ledger()
    for _ in range(3):
        ledger.begin("somebody", 0, "encode", ["a", "b"])
        assert not ledger.begin("another", 0, "encode", ["a", "b"]).condemned
        ledger._in_flight.clear()
        ledger.begin("a third", 0, "encode", ["x", "a"])
    assert outcomes(run(stage, ledger, [batch("ab")])[0]) == dict.fromkeys("ab", "done")


def test_the_failure_says_what_happened_and_may_be_tried_on_another_machine() -> None:
    (rows,), _ = run(_echo("b"), Ledger(), [batch("ab")])
    failure = dict(_outcomes(rows))["b"]
    assert failure == Failure(
        "encode",
        "WorkerDiedError",
        "the encode worker died 2 times on this row, the last time on it alone",
        retryable=True,
    )


def test_rows_that_failed_before_are_nobodys_suspects() -> None:
    stage, ledger = _echo("b"), Ledger()
    results, num_deaths = run(stage, ledger, [batch("abc", failed="b")])
    assert outcomes(results) == {"a": "done", "b": "OSError", "c": "done"}
    assert num_deaths == 0


def test_a_row_that_is_deadly_in_one_stage_is_no_suspect_in_another() -> None:
    ledger = Ledger()
    ledger.begin("first", 0, "partition", ["a"])
    assert ledger.begin("second", 0, "encode", ["a"]) == Verdict()
    assert ledger.deaths() == {}


def test_batches_that_must_not_be_written_to_are_not() -> None:
    rows = batch("abc")
    for column in rows.values():
        column.flags.writeable = False
    results, _ = run(_echo("b"), Ledger(), [rows])
    assert outcomes(results)["b"] == "WorkerDiedError"
    assert rows["error_type"].tolist() == ["", "", ""]


def test_text_columns_of_fixed_width_hold_the_whole_failure() -> None:
    rows = batch("ab")
    rows |= {name: rows[name].astype(str) for name in ("stage", "error_type", "error")}
    results, _ = run(_echo("b"), Ledger(), [rows])
    assert outcomes(results) == {"a": "done", "b": "WorkerDiedError"}


@given(
    st.lists(st.integers(1, 6), max_size=6).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.sets(st.integers(0, max(0, sum(sizes) - 1)), max_size=8))
    )
)
def test_every_row_ends_once_and_the_deadly_ones_alone_fail(case: tuple[list[int], set[int]]) -> None:
    sizes, deadly = case
    keys = iter(map(str, range(sum(sizes))))
    batches = [batch([next(keys) for _ in range(size)]) for size in sizes]
    ledger = Ledger()
    results, num_deaths = run(_echo({str(row) for row in deadly}), ledger, batches)
    expected = {str(row): "WorkerDiedError" if row in deadly else "done" for row in range(sum(sizes))}
    assert outcomes(results) == expected
    assert num_deaths <= 2 * len(deadly & set(range(sum(sizes))))
    assert not ledger._in_flight


def test_when_workers_do_nothing_but_die_the_job_stops() -> None:
    ledger = Ledger()
    for number in range(MAX_DEATHS_IN_A_ROW):
        ledger.begin(f"worker {number}", 0, "encode", ["a"], alone=True)
        ledger._suspects.clear()
    with pytest.raises(ConfigurationError, match=f"encode workers died {MAX_DEATHS_IN_A_ROW} times"):
        ledger.begin("the last", 0, "encode", ["a"], alone=True)


def test_a_row_that_is_done_says_that_the_machines_are_not_at_fault() -> None:
    ledger = Ledger()
    for number in range(2 * MAX_DEATHS_IN_A_ROW):
        ledger.begin(f"worker {number}", 0, "encode", ["a"], alone=True)
        ledger.begin("a healthy one", number, "encode", [f"row {number}"])
        ledger.end("a healthy one", number)
        ledger._suspects.clear()


def test_a_call_that_ends_after_its_worker_was_given_up_harms_nobody() -> None:
    ledger = Ledger()
    ledger.begin("slow", 0, "encode", ["a"])
    assert ledger.begin("other", 0, "encode", ["a"]).suspects == {"a"}
    ledger.end("slow", 0)
    assert ledger.begin("other", 1, "encode", ["a"], alone=True) == Verdict()


# Calls at once


class Worker(Echo):
    """A process with two calls at once: batches die when both are under way, and then nobody lives."""

    name = "generate"

    def __init__(self, _: Any) -> None:
        self.is_dead = threading.Event()
        self.both = threading.Barrier(2, timeout=10)
        self.running: list[str] = []

    def __call__(self, rows: Batch) -> Batch:
        keys = [key for key, failure in _outcomes(rows) if failure is None]
        self.running += keys
        if len(keys) > 1:
            self.both.wait()
        elif keys:
            time.sleep(0.01)
            assert self.running == keys, "a suspect has company"
        if len(keys) > 1 or not set(keys).isdisjoint(self.deadly):
            self.is_dead.set()
            raise Died
        self.running = [key for key in self.running if key not in keys]
        return rows


class Line:
    """To the ledger, for as long as the worker lives."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.is_dead = ledger, threading.Event()

    def begin(self, *call: Any, **options: Any) -> Verdict:
        if self.is_dead.is_set():
            raise Died
        return self.ledger.begin(*call, **options)

    def end(self, *call: Any) -> None:
        self.ledger.end(*call)


def in_threads(calls: Sequence[Callable[[], Batch]]) -> list[Batch | None]:
    """Their results; None for those that died."""
    results: list[Batch | None] = [None] * len(calls)

    def work(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Died:
            return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def test_all_calls_of_a_dead_worker_are_suspects_and_run_alone_from_then_on() -> None:
    stage = type("Worker", (Worker,), {"deadly": "d"})
    ledger, waiting, done, num_workers = Ledger(), [batch("abc"), batch("def")], [], 0
    while waiting:
        line = Line(ledger)
        worker = Guarded(stage, OPTIONS, line, None)
        worker._stage.is_dead = line.is_dead
        results = in_threads([partial(worker, rows) for rows in waiting])
        done += [result for result in results if result]
        waiting = [rows for rows, result in zip(waiting, results, strict=True) if not result]
        num_workers += 1
        assert num_workers <= 3
    assert num_workers == 3
    assert outcomes(done) == dict.fromkeys("abcef", "done") | {"d": "WorkerDiedError"}


def test_calls_without_suspects_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)

    class Meets(Echo):
        def __call__(self, rows: Batch) -> Batch:
            meeting.wait()
            return rows

    worker = Guarded(Meets, OPTIONS, Ledger(), None)
    assert None not in in_threads([lambda: worker(batch("ab")), lambda: worker(batch("cd"))])


# Real stages


def test_every_stage_passes_over_a_row_that_was_given_up(checkpoint: Path) -> None:
    options = config(
        model=str(checkpoint), max_new_tokens=2, dtype="float32", token_budget=0.5, isolated_decoding=False
    )
    questions = to_json([question(0, "What is it?"), question(1, "Where is it?")])
    keys = np.array(["a", "b", "c"], dtype=object)
    rows: Batch = {
        "index": np.arange(3),
        "key": keys,
        "path": keys,
        "questions": np.array([questions] * 3, dtype=object),
        "is_sample": np.array([True, False, True]),
    } | columns.of_images([saved(picture(40, 30 + 10 * row), "PNG") for row in range(3)])
    for stage in (PartitionStage, EncodeStage, GenerateStage):
        ledger = Ledger()
        ledger.begin("dead", 0, stage.name, ["a", "b"])
        ledger.begin("dead too", 0, stage.name, ["b"], alone=True)
        out = Guarded(stage, options, ledger, None)(rows)
        answers = 2 if stage is GenerateStage else 1
        ends = sorted((key, failure.error_type if failure else "done") for key, failure in _outcomes(out))
        assert ends == sorted([("a", "done"), ("b", "WorkerDiedError"), ("c", "done")] * answers)
        assert {len(column) for column in out.values()} == {3 * answers}
        rows = Guarded(stage, options, None, None)(rows)
        assert not any(columns.failures(rows))
        assert {name: column.dtype.kind for name, column in out.items()} == {
            name: column.dtype.kind for name, column in rows.items()
        }


def question(number: int, prompt: str) -> Question:
    return Question(number, str(number), prompt, 2, 0.0, 1.0, 0, ())


# The watchdog


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Of processes that fork from one which has imported what they need, and has no watchdog of pytest's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.hostile_stages"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield context


Run = Callable[..., tuple[int | None, str]]


@pytest.fixture
def run_guarded(processes: Any, tmp_path: Path) -> Run:
    """Runs calls of a stage in a process; its exit code, 0 if it comes to its end, and its words."""

    def run(stage: type, *calls: str, timeout_s: float | None = None, locked_after_s: float = 30.0) -> Any:
        log_file = tmp_path / "log"
        arguments = (stage, [call.split() for call in calls], timeout_s, log_file, locked_after_s)
        process = processes.Process(target=hostile_stages.guarded, args=arguments)
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
            pytest.fail("the process hangs")
        return process.exitcode, log_file.read_text()

    return run


def test_a_call_that_takes_too_long_ends_the_process_and_says_where_it_was(run_guarded: Run) -> None:
    code, words = run_guarded(hostile_stages.Hangs, "a slow", timeout_s=0.3)
    assert code == EXIT_CODE
    assert "generate was not done after 0.3 s with a, slow; ending the process" in words
    assert "in __call__" in words


def test_a_call_that_holds_the_interpreter_is_ended_as_well(run_guarded: Run) -> None:
    code, words = run_guarded(hostile_stages.HoldsTheInterpreter, "a", timeout_s=0.2, locked_after_s=0.3)
    assert code == 1
    assert "in __call__" in words


def test_calls_in_time_are_left_alone_however_many_there_are(run_guarded: Run) -> None:
    assert run_guarded(hostile_stages.Hangs, "a b", "c d", timeout_s=0.8, locked_after_s=0.0) == (0, "")


def test_of_two_calls_the_one_that_is_late_ends_the_process(run_guarded: Run) -> None:
    code, words = run_guarded(hostile_stages.Hangs, "slow", "a b", timeout_s=0.5)
    assert code == EXIT_CODE
    assert "with slow" in words


@pytest.mark.parametrize("stage", [hostile_stages.LosesTheAccelerator, hostile_stages.LosesTheEngine])
def test_a_dead_accelerator_or_engine_ends_the_process(run_guarded: Run, stage: type) -> None:
    code, words = run_guarded(stage, "a b")
    assert code == EXIT_CODE
    assert "generate: the accelerator or its engine failed on a, b" in words


def test_other_errors_are_raised_as_they_come() -> None:
    class Wrong(Echo):
        def __call__(self, rows: Batch) -> Batch:
            raise ConfigurationError("no such policy")

    with pytest.raises(ConfigurationError, match="no such policy"):
        Guarded(Wrong, OPTIONS, Ledger(), 5.0)(batch("ab"))
    assert not is_fatal(ValueError("a bug"))


# In a cluster


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_deadly_rows_of_a_dataset_are_given_up_and_all_others_come_through() -> None:
    import ray

    keys = [f"deadly {row}" if row in (3, 4) else f"row {row}" for row in range(16)]
    attempts = Attempts.start()
    rows = ray.data.from_items([{"key": key} | _alive() for key in keys], override_num_blocks=2)
    done = rows.map_batches(
        Guarded,
        fn_constructor_args=(hostile_stages.Dies, OPTIONS, attempts, 60.0),
        batch_size=8,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2),
        num_cpus=0.5,
        max_task_retries=-1,
    ).take_all()
    assert sorted(row["key"] for row in done) == sorted(keys)
    failed = {row["key"]: row["error_type"] for row in done if row["error_type"]}
    assert failed == {key: "WorkerDiedError" for key in keys if key.startswith("deadly")}
    assert 3 <= attempts.deaths()["generate"] <= 4  # both at once, then each alone


def _alive() -> dict[str, Any]:
    return {"stage": "", "error_type": "", "error": "", "retryable": False}
