"""The account is made from what lies in the files, and speaks up when a row is missing or too many."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.costs import StageCost
from pipeline.manifest import Counts, Manifest, Model, Tokens, fingerprint, read_manifest, versions
from pipeline.report import AccountingError, account, summary, table, write_report
from pipeline.sinks import CAPTIONS, DEAD_LETTERS, fill_up, prepare_output, write_table
from tests.pipeline.inputs import config


def captions(*keys: str) -> pa.Table:
    zero = {field.name: "" if pa.types.is_string(field.type) else 4 for field in CAPTIONS}
    return pa.Table.from_pylist(
        [zero | {"key": key, "caption": f"a | {key}\nb"} for key in keys], schema=CAPTIONS
    )


def dead_letters(*keys: str) -> pa.Table:
    row = {"path": "", "stage": "read", "error_type": "OSError", "error": "", "retryable": True}
    return pa.Table.from_pylist([row | {"key": key} for key in keys], schema=DEAD_LETTERS)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    prepare_output(tmp_path / "out")
    write_table(captions("a", "b"), tmp_path / "out" / "captions" / "part-000000.parquet")
    write_table(captions("c"), tmp_path / "out" / "captions" / "part-000001.parquet")
    write_table(dead_letters("d"), tmp_path / "out" / "dead_letters" / "part-000000.parquet")
    return tmp_path / "out"


def manifest(counts: Counts, tokens: Tokens) -> Manifest:
    return Manifest(
        run_id="run-1",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        finished_at=datetime(2026, 1, 2, tzinfo=UTC),
        wall_s=12.5,
        configuration=config().model_dump(mode="json"),
        versions=versions(),
        model=Model(name="m", sha256="0" * 64, files={}),
        cluster={"CPU": 2, "GPU": 0},
        counts=counts,
        tokens=tokens,
        stages={"read": StageCost(rows=4, busy_s=0.5, peak_rss_bytes=2**20)},
    )


def test_every_row_in_exactly_one_table_is_well(output: Path) -> None:
    counts, tokens = account(output, "abcd")
    assert counts == Counts(rows=4, captions=3, dead_letters=1, dead_letters_by_error={"read: OSError": 1})
    assert tokens == Tokens(visual_full=12, visual_kept=12, prompt=12, completion=12)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("abcde", r"of 5 rows 1 were lost \(e\) and 0 came out too often"),
        ("abc", r"of 3 rows 0 were lost and 1 came out too often \(d\)"),
        ("abdef", r"2 were lost \(e, f\) and 1 came out too often \(c\)"),
    ],
)
def test_lost_and_invented_rows_are_named(output: Path, keys: str, said: str) -> None:
    with pytest.raises(AccountingError, match=said):
        account(output, keys)


def test_a_row_in_both_tables_is_named(output: Path) -> None:
    write_table(dead_letters("a"), output / "dead_letters" / "part-000001.parquet")
    with pytest.raises(AccountingError, match=r"came out too often \(a\)"):
        account(output, "abcd")


def test_a_run_without_captions_is_accounted_for_too(tmp_path: Path) -> None:
    prepare_output(tmp_path / "out")
    write_table(dead_letters("d"), tmp_path / "out" / "dead_letters" / "part-000000.parquet")
    fill_up(tmp_path / "out")
    counts, tokens = account(tmp_path / "out", "d")
    assert (counts.captions, tokens.visual_kept) == (0, 0)
    text = summary(manifest(counts, tokens), tmp_path / "out")
    assert "1 rows: 0 captions, 1 dead letters" in text
    assert "visual tokens" not in text


def test_the_summary_says_how_many_and_where(output: Path) -> None:
    text = summary(manifest(*account(output, "abcd")), output)
    assert "4 rows: 3 captions, 1 dead letters; every row is in exactly one table" in text
    assert "1 read: OSError" in text
    for name in ("captions", "dead_letters", "report.md", "manifest.json"):
        assert str(output / name) in text


def test_the_report_shows_stages_and_captions_in_one_line_each(output: Path) -> None:
    text = write_report(manifest(*account(output, "abcd")), output).read_text()
    assert "| a | a \\| a b |" in text
    assert "| hired | 0.2 | read | 4 | 0.50 | 8.0 | 1 |" in text


def test_the_manifest_can_be_read_again(output: Path) -> None:
    written = manifest(*account(output, "abcd"))
    written.write(output)
    assert read_manifest(output) == written
    assert len(table([written, written])) == 4


def test_the_fingerprint_depends_on_every_weight_and_on_no_name(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
        (tmp_path / folder / "config.json").write_bytes(b"{}")
        (tmp_path / folder / "README.md").write_text(folder)
    one, two = (fingerprint("m", tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert list(one.files) == ["config.json", "model.safetensors"]
    (tmp_path / "two" / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint("m", tmp_path / "two").sha256 != one.sha256
