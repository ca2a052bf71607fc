"""All arms get the same images and the same prompt."""

from __future__ import annotations

import pytest

from hired.errors import ConfigurationError
from pipeline.benchmark.arms import ARMS, chosen, largest_batch, loaded
from pipeline.benchmark.subject import Subject

PAIRS = [("keep-all", "transformers"), ("hired-20", "transformers-20")]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_transformers_and_we_prefill_the_same_lengths_and_answer_in_full(
    subject: Subject, ours: str, theirs: str, batch: int | None
) -> None:
    options = subject.engine_options(2**28)
    rows, num_new = range(len(subject.partitions)), subject.options.max_new_tokens
    works = []
    for name in (ours, theirs):
        with loaded(ARMS[name].system, subject, options) as system:
            works.append(system.run(ARMS[name], rows, batch, max_new_tokens=num_new))
    assert works[0].prompt_tokens == works[1].prompt_tokens
    assert [work.completion_tokens for work in works] == [num_new * len(rows)] * 2
    assert all(0 <= (work.encode_s or 0) < work.total_s for work in works)


@pytest.mark.parametrize("name", ["hired-20", "transformers", "transformers-20"])
def test_every_image_has_a_first_token_before_its_batch_ends(subject: Subject, name: str) -> None:
    with loaded(ARMS[name].system, subject, subject.engine_options(2**28)) as system:
        work = system.run_watching(ARMS[name], range(3), 2)
    assert len(work.first_token_s) == len(work.prompt_tokens) == 3
    assert all(0 < seconds < work.total_s for seconds in work.first_token_s)
    assert work.completion_tokens == 3 * subject.options.max_new_tokens


def test_fewer_visual_tokens_are_a_larger_batch(subject: Subject) -> None:
    per_token = subject.language.kv_bytes_per_token(subject.dtype)
    places = 64 * 10
    assert largest_batch(subject, 61, per_token * places) == 10  # 61 and 3 new ones are one extent of 64
    assert largest_batch(subject, 62, per_token * places) == 5
    assert largest_batch(subject, 700, per_token * places) == 0


def test_unknown_arms_are_refused() -> None:
    assert list(chosen(())) == list(ARMS)
    assert list(chosen(["hired-20", "keep-all"])) == ["keep-all", "hired-20"]
    with pytest.raises(ConfigurationError, match="hired-30"):
        chosen(["hired-30"])
