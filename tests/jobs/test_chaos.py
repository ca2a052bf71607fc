"""The chaos job at its smallest: a driver killed in the middle of a commit, and a worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import chaos


@pytest.mark.ray
@pytest.mark.slow
def test_runs_that_were_killed_end_with_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    step = chaos.STEPS.index(("_work/shards", 0))
    planned = [chaos.Blow("driver at a step", step, after=False), chaos.Blow("generate worker", 2)]
    monkeypatch.setattr(chaos, "blows", lambda rounds, seed: planned[:rounds])
    assert chaos.main(["--rounds=2", "--rows=60", f"--output={tmp_path}"]) == 0
    driver, worker = json.loads((tmp_path / "chaos.json").read_text())["rounds"]
    assert (driver["struck"], driver["starts"], driver["lost"], driver["doubled"]) == (True, 2, 0, 0)
    assert (worker["struck"], worker["starts"], worker["lost"], worker["doubled"]) == (True, 1, 0, 0)
    assert "**2 held**" in (tmp_path / "chaos.md").read_text()
    assert "driver before _work/shards number 0" in capsys.readouterr().out


def test_every_kind_of_blow_falls_in_ten_rounds_and_a_seed_repeats_them() -> None:
    planned = chaos.blows(20, seed=0)
    assert {blow.kind for blow in planned} == set(chaos.KINDS)
    assert len({blow.at for blow in planned if blow.kind == "driver at a step"}) == 10
    assert planned == chaos.blows(20, seed=0) != chaos.blows(20, seed=1)


def test_a_row_that_is_lost_or_doubled_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = chaos.Round("node, 1", starts=1, struck=True, lost=1, doubled=0, seconds=1.0)
    monkeypatch.setattr(chaos, "run_round", lambda *_: bad)
    assert chaos.main(["--rounds=1", "--rows=60"]) == 1
    assert "**0 held**, 1 did not" in capsys.readouterr().out
