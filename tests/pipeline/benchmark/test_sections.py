"""Every section runs at toy size and leaves every figure; what was not measured says so. No figure's size is
asserted: a busy machine is no failure.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from hired.errors import ConfigurationError
from pipeline.benchmark import encoding, generation, latency, stages
from pipeline.benchmark.arms import ARMS, is_installed
from pipeline.benchmark.measure import NOT_INSTALLED, NOT_MEASURED, OUT_OF_MEMORY
from pipeline.benchmark.subject import Subject

RUNNING = [name for name, arm in ARMS.items() if arm.system != "vllm"]
ENGINE = [name for name, arm in ARMS.items() if arm.system == "engine"]


def is_spread(cell: Any) -> bool:
    return set(cell) == {"median", "min", "max"} and 0 < cell["min"] <= cell["median"] <= cell["max"]


@pytest.fixture(scope="module")
def engine(subject: Subject) -> list[dict[str, Any]]:
    return generation.measure(subject)


def test_the_engine_section_has_every_figure(engine: list[dict[str, Any]]) -> None:
    assert [entry["cap_gib"] for entry in engine] == [None, 0.01]
    for entry in engine:
        for name in RUNNING:
            for batching in ("equal", "own"):
                cell = entry["arms"][name][batching]
                assert is_spread(cell["images_per_s"])
                assert is_spread(cell["output_tokens_per_s"])
                assert is_spread(cell["roofline_share"])
                assert cell["memory_gib"] > 0
            assert entry["arms"][name]["largest_batch"] > 0
        for name in ENGINE:
            own = entry["arms"][name]["own"]
            assert is_spread(own["encode_s"])
            assert is_spread(own["generate_s"])
        for name in set(ARMS) - set(RUNNING):
            assert is_installed("vllm") or entry["arms"][name] == NOT_INSTALLED
    json.dumps(engine)


def test_dropped_tokens_are_memory_and_memory_is_batch(engine: list[dict[str, Any]]) -> None:
    for entry in engine:
        arms = entry["arms"]
        lengths = [arms[name]["prompt_tokens"] for name in ENGINE]
        assert lengths == sorted(lengths, reverse=True)
        assert arms["hired-10"]["largest_batch"] > arms["keep-all"]["largest_batch"]
        assert arms["hired-10"]["equal"]["memory_gib"] < arms["keep-all"]["equal"]["memory_gib"]
    assert engine[1]["arms"]["keep-all"]["largest_batch"] < engine[0]["arms"]["keep-all"]["largest_batch"]


def test_ratios_are_those_of_the_medians(engine: list[dict[str, Any]]) -> None:
    for entry in engine:
        own = {name: entry["arms"][name]["own"] for name in RUNNING}
        found = entry["ratios"]
        rates = {name: cell["images_per_s"]["median"] for name, cell in own.items()}
        assert found["hired 20 % against keep-all, whole"] == pytest.approx(
            rates["hired-20"] / rates["keep-all"], rel=1e-3
        )
        assert found["hired 20 % against keep-all, language model alone"] == pytest.approx(
            own["keep-all"]["generate_s"]["median"] / own["hired-20"]["generate_s"]["median"], rel=1e-3
        )
        assert found["keep-all against transformers generate, all tokens"] == pytest.approx(
            rates["keep-all"] / rates["transformers"], rel=1e-3
        )


def test_a_cap_that_does_not_hold_the_weights_is_refused(subject: Subject) -> None:
    with pytest.raises(ConfigurationError, match="do not hold the weights"):
        subject.engine_options(1000)


def test_a_prompt_beyond_the_cap_is_out_of_memory_and_a_pruned_one_is_not(subject: Subject) -> None:
    per_token = subject.language.kv_bytes_per_token(subject.dtype)
    cap_gib = (subject.weight_bytes + 64 * per_token) / 2**30
    entry = generation._under(subject, cap_gib)
    assert entry["arms"]["keep-all"]["equal"] == OUT_OF_MEMORY
    assert entry["arms"]["transformers"]["own"] == OUT_OF_MEMORY
    assert entry["arms"]["hired-10"]["largest_batch"] == 1
    assert entry["ratios"]["hired 10 % against keep-all, whole"] == NOT_MEASURED


def test_the_latency_section_has_every_figure(subject: Subject) -> None:
    found = latency.measure(subject)
    assert list(found["batches"]) == ["1", "2"]
    for cells in found["batches"].values():
        for name in RUNNING:
            assert is_spread(cells[name]["output_tokens_per_s"])
            assert is_spread(cells[name]["first_token_s"])
            assert cells[name]["first_token_p99_s"] >= cells[name]["first_token_s"]["min"]
            assert cells[name]["memory_gib"] > 0
    first = found["batches"]["1"]
    assert found["changes"]["memory"] == pytest.approx(
        1 - first["hired-20"]["memory_gib"] / first["keep-all"]["memory_gib"], abs=1e-3
    )
    assert found["changes"]["time to first token"] == pytest.approx(
        1 - first["hired-20"]["first_token_s"]["median"] / first["keep-all"]["first_token_s"]["median"],
        abs=1e-3,
    )
    json.dumps(found)


def test_the_encoder_section_has_every_figure(subject: Subject) -> None:
    found = encoding.measure(subject)
    for cell in found["arms"].values():
        assert is_spread(cell["ms_per_image"])
        assert is_spread(cell["roofline_share"])
    ms = {name: found["arms"][name]["ms_per_image"]["median"] for name in ("transformers", "hired-20")}
    assert found["against_the_plain_tower"]["hired-20"] == pytest.approx(
        ms["hired-20"] / ms["transformers"], rel=1e-3
    )
    json.dumps(found)


def test_the_stages_section_has_every_figure(subject: Subject) -> None:
    found = stages.measure(subject)
    assert is_spread(found["partition_images_per_s_per_core"])
    for name in ENGINE:
        cell = found["arms"][name]
        assert cell["prompts_at_once"] == len(subject.files)
        for stage in ("encode", "prefill", "generate", "whole"):
            assert is_spread(cell[f"{stage}_images_per_s"])
        for stage in ("encode", "prefill", "decode"):
            assert is_spread(cell[f"{stage}_roofline_share"])
    json.dumps(found)
