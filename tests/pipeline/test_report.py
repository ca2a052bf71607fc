"""The page says what the manifest says, needs nothing from elsewhere, and trusts no text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hired.types import Box, Grid, Partitions, Size
from pipeline.gallery import GallerySample
from pipeline.manifest import Manifest
from pipeline.plan import Plan, StagePlan
from pipeline.report import page, summary, summary_json, table, write_report
from pipeline.storage import Store
from pipeline.tally import Counts, Example, Histograms, Tokens
from tests.pipeline.finished_runs import manifest, session

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """A page's elements and words; refuses one whose elements are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sample(key: str = "a.jpg", caption: str = "a sign") -> GallerySample:
    pixels = np.full((5, 96, 96, 3), 90, np.uint8)
    partitions = Partitions(pixels, Grid(2, 2), Box(0, 0, 192, 192), Size(400, 400))
    kept = np.zeros((5, 16), dtype=bool)
    kept[0, :4] = kept[2, :3] = True
    return GallerySample(key, "Describe the image.", caption, partitions, kept)


def plan() -> Plan:
    stage = StagePlan(
        name="generate", on_gpu=True, row_s=20.0, fastest_s=18.0, slowest_s=30.0, cpu_s=1.0, actors=2,
        num_cpus=1.0, num_gpus=1.0, threads=1, worker_rate=0.05, pool_rate=0.1, busy=1.0, needed=2,
        balanced=2,
    )  # fmt: skip
    return Plan(
        num_cpus=4.0, num_gpus=2.0, rows=100, rows_measured=32, failures=2, bytes=10**6, visual_full=100_000,
        visual_kept=20_000, completion_tokens=1_000, stages=[stage], limits={"generate": 0.1},
        bottleneck="generate", rate=0.1, balanced_rate=0.1, start_up_s=10.0, load_s=20.0, ends_s=5.0,
        eta_s=1500.0, gpu_hours=0.8, cpu_hours=1.6, notes=("take it for a guess",),
    )  # fmt: skip


def test_the_page_is_well_formed_and_asks_the_network_for_nothing() -> None:
    html = page(manifest(plan=plan()), [sample(), sample("b.jpg")])
    parsed = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not parsed.all("script")
    assert not parsed.all("link")
    assert {str(image["src"]).split(",")[0] for image in parsed.all("img")} == {"data:image/webp;base64"}
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", html)
    policy = next(meta for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_totals_are_told() -> None:
    text = Page(page(manifest(duplicates=12), [])).text
    assert "97 captions from photos" in text
    assert "Dead letters 3 1 may succeed another time" in text
    assert "Copies left out 12" in text
    assert "Time at work 0:30:00 0.0556 rows a second" in text
    assert "Visual tokens kept 20.0 % 19,400 of 97,000" in text
    assert "GPU-hours 1" in text
    assert "in 2 sessions" in text


def test_the_cost_is_told_where_a_price_is_given() -> None:
    assert "Cost" not in Page(page(manifest(), [])).text
    text = Page(page(manifest(configuration={"gpu_hour_price": 2.5}), [])).text
    assert "Cost 2.50 at 2.5 a GPU-hour; 25.8 a thousand captions" in text


def test_stages_tell_how_many_workers_were_busy() -> None:
    text = Page(page(manifest(), [])).text
    assert "read 100 9.0 11.1 0.01 – 256 MiB" in text  # noqa: RUF001
    assert "generate 97 2,700.0 0.0359 1.50 of 2 75 % 1,024 MiB" in text
    assert "The workers of generate waited least" in text


def test_failures_are_grouped_with_their_examples_most_frequent_first() -> None:
    text = Page(page(manifest(), [])).text
    start = text.index("Stage: kind")
    assert text[start:].index("partition: UnreadableImageError 2 a.jpg") < text[start:].index(
        "read: TimeoutError 1 c.jpg"
    )
    assert "b.jpg no picture" in text
    assert "--retry-failed" in text


def test_plan_and_actual_stand_side_by_side() -> None:
    text = Page(page(manifest(plan=plan()), [])).text
    assert "the bottleneck was to be generate" in text
    assert "time 1,500 s 1,800 s +20 %" in text
    assert "visual tokens an image, after 200 194 -3 %" in text
    assert "take it for a guess" in text
    assert "Plan and actual" not in Page(page(manifest(), [])).text


def test_what_is_needed_to_run_it_again_is_there() -> None:
    text = Page(page(manifest(), [])).text
    assert "python jobs/caption_corpus.py --input photos --prompt 'What is <this>?'" in text
    assert "generate.max_actors 2" in text
    assert "token_budget 0.2" in text
    assert "torch 2.13.0" in text
    assert "0123abcd" * 8 in text


def test_the_gallery_shows_at_most_twelve_samples_with_words_for_those_who_cannot_see() -> None:
    parsed = Page(page(manifest(), [sample(f"{number}.jpg") for number in range(20)]))
    images = parsed.all("img")
    assert len(images) == 24
    assert images[0]["alt"] == "full-image of 0.jpg, with 4 of 16 tokens kept and the others dimmed"
    assert images[1]["alt"] == "sub-images of 0.jpg, with 3 of 64 tokens kept and the others dimmed"
    assert all(image["width"] and image["height"] for image in images)


def test_tables_and_charts_can_be_heard() -> None:
    parsed = Page(page(manifest(plan=plan()), [sample()]))
    assert all("scope" in header for header in parsed.all("th"))
    titles = {element["id"] for element in parsed.all("title") if "id" in element}
    charts = parsed.all("svg")
    assert len(charts) == 2
    assert {chart["aria-labelledby"] for chart in charts} == titles
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert parsed.all("html")[0]["lang"] == "en"


EVIL = "<script>alert(1)</script>\"' onload='x' {{ 7 * 7 }} &amp;"


def test_no_text_of_a_run_becomes_a_part_of_the_page() -> None:
    run = manifest(
        command=EVIL,
        configuration={"input": EVIL, "prompt": EVIL},
        versions={EVIL: EVIL},
        failures={"read: TimeoutError": [Example(key=EVIL, message=EVIL)]},
    )
    plain, evil = Page(page(manifest(), [sample()])), Page(page(run, [sample(EVIL, EVIL)]))
    assert not evil.all("script")
    assert not [name for _, attributes in evil.elements for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in evil.elements} == {tag for tag, _ in plain.elements}
    assert evil.text.count("{{ 7 * 7 }}") >= 6


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": Counts(), "tokens": Tokens(), "histograms": Histograms(), "failures": {}, "stages": {}},
        {"sessions": [], "wall_s": 0.0},
        {"sessions": [], "plan": plan(), "wall_s": 0.0},
        {"sessions": [session(0, 3.0).model_copy(update={"progress": []})], "command": ""},
        {
            "counts": Counts(rows=2, dead_letters=2, dead_letters_by_error={"read: OSError": 2}),
            "tokens": Tokens(),
            "histograms": Histograms(),
            "failures": {},
        },
    ],
)
def test_runs_that_lack_something_have_a_page_too(changes: dict[str, Any]) -> None:
    run = manifest(**changes)
    assert "report" not in Page(page(run, [])).text.split()[:1]
    assert summary(run, "out").startswith(f"{run.counts.rows} rows")
    assert json.loads(summary_json(run))["captions"] == run.counts.captions


def test_the_page_is_written_below_the_output(tmp_path: Path) -> None:
    uri = write_report(manifest(), Store(tmp_path / "out"), [sample()])
    assert uri == str(tmp_path / "out" / "report.html")
    assert Path(uri).read_text(encoding="utf-8") == page(manifest(), [sample()])


def test_the_summary_says_how_many_and_where() -> None:
    text = summary(manifest(), "s3://bucket/out/")
    assert "100 rows: 97 captions, 3 dead letters; each is in exactly one table. 0:30:00." in text
    assert "2 partition: UnreadableImageError" in text
    assert "1 of them may succeed another time: add --retry-failed" in text
    assert "200 of 1000 visual tokens an image (20.0%)" in text
    for name in ("captions", "dead_letters", "report.html", "manifest.json"):
        assert f"s3://bucket/out/{name}" in text


def test_several_questions_are_counted_as_answers() -> None:
    run = manifest(configuration={"prompts": "prompts.yaml"})
    assert summary(run, "out").startswith("100 answers: 97 captions")


def test_the_summary_for_programs_has_the_counts_and_the_places() -> None:
    told = json.loads(summary_json(manifest(configuration={"gpu_hour_price": 3.0})))
    assert (told["rows"], told["captions"], told["dead_letters"], told["retryable"]) == (100, 97, 3, 1)
    assert told["report"] == "/out/report.html"
    assert told["gpu_hours"] == pytest.approx(1.0)
    assert told["cost"] == pytest.approx(3.0)
    assert told["tokens"]["visual_kept"] == 19_400
    assert told["stages"]["generate"]["busy_s"] == 2700.0


def test_runs_stand_side_by_side() -> None:
    one: Manifest = manifest()
    lines = table([one, one.model_copy(update={"run_id": "run-2"})])
    assert len(lines) == 6
    assert lines[2] == "| run-1 | hired | 0.2 | read | 100 | 9.00 | 11.1 | 256 |"
    assert lines[5].startswith("| run-2 | hired | 0.2 | generate |")


def test_plan_and_actual_agree_on_a_row_whatever_sessions_were_killed_and_questions_asked() -> None:
    counts = Counts(rows=200, captions=194, dead_letters=6, dead_letters_by_error={"read: OSError": 6})
    twice = Tokens(visual_full=2 * 97_000, visual_kept=2 * 19_400, completion=970)
    run = manifest(plan=plan(), counts=counts, tokens=twice, sessions=[session(60, 1000.0)], wall_s=1000.0)
    text = Page(page(run, [])).text
    assert "rows 100 60" in text
    assert "failures a thousand rows 20 33.3" in text
    assert "visual tokens an image, before 1,000 970" in text
    assert "output tokens an image 10 9.7" in text
