"""The page says what was measured, what was not, and what the paper printed."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.benchmark.measure import NOT_MEASURED, OUT_OF_MEMORY, spread
from pipeline.benchmark.page import page
from pipeline.benchmark.subject import SECTIONS


def record(**sections: Any) -> dict[str, Any]:
    return {
        "model": "toy",
        "hardware": "a machine",
        "device": "cpu",
        "versions": {"python": "3.12", "torch": "2.13"},
        "commit": "abc",
        "dtype": "float32",
        "threads": 2,
        "parameters": 6_000_000,
        "ceilings": {"tflops_per_s": 1.5, "gb_per_s": 20.0},
        "sections": {
            name: {"command": f"measure {name}", "figures": value} for name, value in sections.items()
        },
    }


def rows(text: str, start: str) -> list[list[str]]:
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]
    assert found, f"no row {start!r} in\n{text}"
    return found


def test_a_page_of_nothing_says_so_in_every_section() -> None:
    text = page(record())
    assert text.count("Not measured.\n") == len(SECTIONS)
    [[_, value]] = rows(text, "Ray job against the bare loop")
    assert value == NOT_MEASURED


def latency_cells() -> dict[str, Any]:
    measured = {
        "output_tokens_per_s": spread([9.0, 10.0, 11.0]),
        "first_token_s": spread([0.5]),
        "first_token_p99_s": 0.75,
        "memory_gib": 14.0,
    }
    return {
        "images": 8,
        "batches": {"1": {"hired-20": measured, "keep-all": OUT_OF_MEMORY}},
        "changes": {"time to first token": 0.71, "memory": NOT_MEASURED},
    }


def test_the_papers_figures_stand_beside_ours() -> None:
    text = page(record(latency=latency_cells()))
    assert "    measure latency\n" in text
    assert rows(text, "1 | hired 20 %") == [
        ["1", "hired 20 %", "10 (9 to 11)", "0.5 (0.5 to 0.5)", "0.75", "14", "2.3", "4.21", "13.76"]
    ]
    assert rows(text, "1 | keep-all")[0][2] == OUT_OF_MEMORY
    assert rows(text, "4 | keep-all")[0][2:] == [NOT_MEASURED] * 4 + [OUT_OF_MEMORY] * 3
    assert rows(text, "hired 20 %, time to first token saved") == [
        ["hired 20 %, time to first token saved at batch 1", "71.0%"]
    ]
    assert rows(text, "hired 20 %, memory saved")[0][1] == NOT_MEASURED


@pytest.mark.parametrize("value", [0.5, NOT_MEASURED])
def test_a_corpus_too_small_for_start_up_is_not_measured(value: float | str) -> None:
    figures = {
        "images": 3,
        "threads": 1,
        "bare_images": 2,
        "bare_images_per_s": spread([2.0]),
        "ray_images_per_s": spread([1.0]) if value == 0.5 else NOT_MEASURED,
        "ray_images_per_s_with_start_up": spread([0.1]),
        "ray_against_bare": value,
        "start_up_s": NOT_MEASURED,
        "start_up_share": NOT_MEASURED,
        "options": ["generate.threads=2"],
    }
    text = page(record(ray=figures))
    assert "Job options: generate.threads=2." in text
    assert rows(text, "Ray against the bare loop")[0][1] == ("0.50x" if value == 0.5 else NOT_MEASURED)
    assert rows(text, "start-up, share")[0][1] == NOT_MEASURED


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    engine = [{
        "cap_gib": 24.0, "memory_gib": 24.0, "images": 3, "equal_batch": 2, "max_new_tokens": 4,
        "arms": {
            "keep-all": {
                "prompt_tokens": 10.0, "largest_batch": 2, "searched": {}, "equal": OUT_OF_MEMORY,
                "own": {
                    "batch": 2, "images_per_s": spread([1.0]), "output_tokens_per_s": spread([4.0]),
                    "encode_s": NOT_MEASURED, "generate_s": spread([1.0]), "memory_gib": 1.0,
                    "roofline_share": spread([0.5]),
                },
            },
        },
        "ratios": {"one against other": 1.5},
    }]  # fmt: skip
    text = page(record(engine=engine, latency=latency_cells()))
    assert rows(text, "one against other, 24 GiB")[0][1] == "1.50x"
    widths: set[int] = set()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            widths.add(line.count("|"))
        else:
            assert len(widths) <= 1, f"a ragged table before {line!r}"
            widths = set()
