"""The model that ships: its size, its record, and what it knows of scenes painted just now."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from safetensors import safe_open

import hired
from hired.embedded import CHECKPOINT, examination
from hired.embedded.examination import Tally
from hired.embedded.tokenisation import build_tokenizer

BOUND_BYTES = 32 * 2**20
READING = frozenset({"read"})


@pytest.fixture(scope="module")
def vlm() -> hired.VLM:
    return hired.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CHECKPOINT / "training.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return list(examination.held_out_scenes(30, seed=77))


def test_it_is_small_and_its_weights_are_half_precision() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= BOUND_BYTES
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_its_tokenizer_is_the_one_that_the_code_builds() -> None:
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert shipped.get_vocab() == build_tokenizer().get_vocab()


def test_its_record_says_how_it_was_made_and_meets_the_bars(record: dict[str, Any]) -> None:
    assert {"command", "seed", "hours", "hardware", "versions"} <= record.keys()
    everything, full_image = (record["exact_answers"][name] for name in ("all tokens", "full-image alone"))
    for task in ("shape", "colour", "yes-no"):
        assert everything[task]["share"] >= 0.9, task
    assert everything["read"]["share"] >= 0.7
    assert full_image["read"]["share"] < 0.3


def test_cls_attention_finds_the_ink(vlm: hired.VLM, scenes: list[Any]) -> None:
    areas = examination.attention_against_ink(vlm, scenes)
    final = vlm.encoder.feature_layer
    for kind in ("full-image", "sub-image"):
        assert areas[f"layer {final}, {kind}"] >= 0.85
        assert areas[f"layer 0, {kind}"] >= 0.8


@pytest.mark.slow
def test_it_reads_and_sees_what_is_painted_now(vlm: hired.VLM, scenes: list[Any]) -> None:
    keep_all = partial(
        examination.examine, vlm, scenes, seed=0, budget=hired.Budget(rate=1.0), policy="keep-all"
    )
    everything = keep_all(tasks=frozenset({"read", "shape", "colour", "yes-no"}))
    simple = sum((everything[t] for t in ("shape", "colour", "yes-no")), start=Tally())
    assert simple.total >= 60
    assert simple.share >= 0.9
    assert everything["read"].share >= 0.65  # the record has 0.84 over more questions
    full_image = keep_all(select=examination.full_image_only, tasks=READING)
    assert full_image["read"].share < 0.3
