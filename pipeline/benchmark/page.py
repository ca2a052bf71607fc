"""The record of a run as a page of Markdown. What the record does not hold is "not measured"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.benchmark.arms import ARMS
from pipeline.benchmark.encoding import TITLES
from pipeline.benchmark.latency import BATCHES, PAPER
from pipeline.benchmark.measure import NOT_MEASURED, OUT_OF_MEMORY

Record = Mapping[str, Any]


def page(record: Record) -> str:
    """All sections, measured or not."""
    sections = record["sections"]
    lines = [
        f"# Benchmark: {record['model']}",
        "",
        _surroundings(record),
        "",
        "Medians of repeats, smallest and largest in brackets; a first round warms up and is left out. "
        "Arms take turns"
        + (
            "; each system (our engine, transformers, vLLM) has the GPU to itself, one after the other."
            if record["device"].startswith("cuda")
            else ", except vLLM, which runs when the others are gone."
        ),
        "",
        *_summary(sections),
        *_engine(sections.get("engine")),
        *_latency(sections.get("latency")),
        *_encoder(sections.get("encoder")),
        *_stages(sections.get("stages")),
        *_ray(sections.get("ray")),
        *_plan(sections.get("plan")),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _surroundings(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    ceilings = record["ceilings"]
    return (
        f"{record['hardware']}; {record['dtype']}; {record['threads']} threads; {versions}; "
        f"commit {record['commit']}. {record['parameters'] / 1e6:.0f} million parameters. Ceilings measured "
        f"in this run: {ceilings['tflops_per_s']} TFLOP/s in matrix products, {ceilings['gb_per_s']} GB/s "
        "of memory."
    )


def _head(title: str, section: Any, words: str) -> list[str]:
    """A section's title, what it is, and the command that measured it."""
    if section is None:
        return [f"## {title}", "", NOT_MEASURED.capitalize() + ".", ""]
    return [f"## {title}", "", words, "", f"    {section['command']}", ""]


def _summary(sections: Record) -> list[str]:
    """The ratios that everything is about."""
    rows: list[tuple[str, Any]] = []
    entries = _figures(sections, "engine") or [{"cap_gib": None, "ratios": {}}]
    for entry in entries:
        where = f", {entry['cap_gib']:g} GiB" if entry["cap_gib"] else ""
        rows += [(name + where, _times(value)) for name, value in entry["ratios"].items()]
    stages, latency = _figures(sections, "stages") or {}, _figures(sections, "latency") or {}
    encoder, ray = _figures(sections, "encoder") or {}, _figures(sections, "ray") or {}
    whole = "hired 20 % against keep-all, from bytes to captions"
    rows.append((whole, _times(stages.get(whole))))
    for arm in ("keep-all", "hired-20"):
        cell = stages.get("arms", {}).get(arm, {})
        for kind in ("prefill", "decode"):
            share = _share(cell.get(f"{kind}_roofline_share"))
            rows.append((f"{ARMS[arm].title}, {kind}, share of the roofline", share))
    for what in ("time to first token", "memory"):
        rows.append((f"hired 20 %, {what} saved at batch 1", _share(latency.get("changes", {}).get(what))))
    against = encoder.get("against_the_plain_tower", {})
    rows.append(
        ("encoder with hired 20 %, its time against the plain tower's", _times(against.get("hired-20")))
    )
    rows.append(("Ray job against the bare loop, start-up left out", _times(ray.get("ray_against_bare"))))
    return [*_table(("ratio", "measured"), rows), ""]


def _engine(section: Any) -> list[str]:
    lines = _head(
        "Encode and generate",
        section,
        "Images are partitioned beforehand. At its own batch an arm of ours gets all images at once and its "
        "engine admits what the memory holds; the baseline gets the fastest of the batches that were "
        "searched. Memory is weights, keys and values of the batch and, on a GPU, all else at its peak.",
    )
    for entry in section["figures"] if section else []:
        limit = f"A cap of {entry['cap_gib']:g} GiB" if entry["cap_gib"] else f"{entry['memory_gib']:g} GiB"
        lines += [
            f"### {limit}",
            "",
            f"{entry['images']} images, {entry['max_new_tokens']} new tokens at most.",
            "",
        ]
        rows = [row for arm in ARMS for row in _engine_rows(arm, entry["arms"].get(arm, NOT_MEASURED))]
        head = (
            "arm", "batch", "images/s", "output tokens/s", "encode s", "generate s",
            "memory GiB", "of the roofline", "prompt tokens", "largest batch",
        )  # fmt: skip
        lines += [*_table(head, rows), ""]
    return lines


def _engine_rows(arm: str, cell: Any) -> Iterable[Sequence[str]]:
    if not isinstance(cell, dict):
        return [[ARMS[arm].title, *[str(cell)] * 9]]
    rows = []
    for batching in ("equal", "own"):
        figures = cell[batching]
        if isinstance(figures, dict):
            measured = [
                f"{figures['batch']} ({batching})",
                *(
                    _spread(figures[name])
                    for name in ("images_per_s", "output_tokens_per_s", "encode_s", "generate_s")
                ),
                f"{figures['memory_gib']:g}",
                _share(figures["roofline_share"]),
            ]
        else:
            measured = [batching, *[str(figures)] * 6]
        rows.append([ARMS[arm].title, *measured, str(cell["prompt_tokens"]), str(cell["largest_batch"])])
    return rows


def _latency(section: Any) -> list[str]:
    lines = _head(
        "Time to first token, beside the paper's Table 4",
        section,
        "The clock starts before the encoder. *Paper*: LLaVA-NeXT-7B on one Tesla P40 of 24 GB, as printed "
        "in Arif et al., arXiv 2408.10945, Table 4; with other models and devices only ratios compare.",
    )
    if not section:
        return lines
    batches = section["figures"]["batches"]
    rows = []
    for batch in BATCHES:
        for arm, spec in ARMS.items():
            cell = batches.get(str(batch), {}).get(arm, NOT_MEASURED)
            rows.append([str(batch), spec.title, *_latency_figures(cell), *_paper(batch, arm)])
    head = (
        "batch", "arm", "output tokens/s", "first token s, p50", "p99", "memory GiB",
        "paper: tokens/s", "paper: first token s", "paper: GPU GB",
    )  # fmt: skip
    return [*lines, *_table(head, rows), ""]


def _latency_figures(cell: Any) -> list[str]:
    if not isinstance(cell, dict):
        return [str(cell)] * 4
    return [
        _spread(cell["output_tokens_per_s"]),
        _spread(cell["first_token_s"]),
        f"{cell['first_token_p99_s']:g}",
        f"{cell['memory_gib']:g}",
    ]


def _paper(batch: int, arm: str) -> list[str]:
    if arm not in PAPER[batch]:
        return [""] * 3
    printed = PAPER[batch][arm]
    return [OUT_OF_MEMORY] * 3 if printed is None else [f"{figure:g}" for figure in printed]


def _encoder(section: Any) -> list[str]:
    lines = _head(
        "Encoder",
        section,
        "The plain tower gets finished float pixels, runs every layer and leaves its features on the device. "
        "Ours gets uint8 and copies what is kept back to the host.",
    )
    if not section:
        return lines
    figures = section["figures"]
    rows = []
    for name, title in TITLES.items():
        cell = figures["arms"].get(name, NOT_MEASURED)
        against = figures["against_the_plain_tower"].get(name)
        if isinstance(cell, dict):
            shown = [_spread(cell["ms_per_image"]), _share(cell["roofline_share"])]
        else:
            shown = [str(cell)] * 2
        rows.append([title, *shown, "1x" if name == "transformers" else _times(against)])
    num_partitions = f"{figures['partitions_per_image']:g} partitions"
    words = f"{figures['images']} images of {num_partitions}, {figures['batch']} a call."
    head = ("arm", "ms an image", "of the matrix rate", "time against the plain tower")
    return [*lines, words, "", *_table(head, rows), ""]


def _stages(section: Any) -> list[str]:
    lines = _head(
        "Stages",
        section,
        "Each alone, then all in this process from bytes to captions. Prefill is generation of one token, "
        "for prompts that the memory holds at once; decoding is what follows each one's first token.",
    )
    if not section:
        return lines
    figures = section["figures"]
    rate = _spread(figures["partition_images_per_s_per_core"])
    head = (
        "arm", "encode images/s", "of matrix rate", "prefill images/s", "of matrix rate",
        "decode tokens/s", "of the roofline", "generate images/s", "whole images/s",
    )  # fmt: skip
    rows = []
    for arm, spec in ARMS.items():
        if spec.system == "engine":
            cell = figures["arms"].get(arm, {})
            rows.append(
                [
                    spec.title,
                    _spread(cell.get("encode_images_per_s")), _share(cell.get("encode_roofline_share")),
                    _spread(cell.get("prefill_images_per_s")), _share(cell.get("prefill_roofline_share")),
                    _spread(cell.get("decode_tokens_per_s")), _share(cell.get("decode_roofline_share")),
                    _spread(cell.get("generate_images_per_s")), _spread(cell.get("whole_images_per_s")),
                ]
            )  # fmt: skip
    return [*lines, f"Partitioning: {rate} images/s a core.", "", *_table(head, rows), ""]


def _ray(section: Any) -> list[str]:
    lines = _head(
        "Under Ray",
        section,
        "The captioning job on files against the bare loop over the same files: same model, batch sizes and "
        "number of threads, hired 20 %. Start-up is what the job takes before its first rows and after its "
        "last.",
    )
    if not section:
        return lines
    figures = section["figures"]
    rows = [
        ("bare loop, images/s", _spread(figures["bare_images_per_s"])),
        ("Ray, images/s, start-up left out", _spread(figures["ray_images_per_s"])),
        ("Ray, images/s, start-up included", _spread(figures["ray_images_per_s_with_start_up"])),
        ("Ray against the bare loop, start-up left out", _times(figures["ray_against_bare"])),
        ("start-up s", _spread(figures["start_up_s"])),
        ("start-up, share of the run", _share(figures["start_up_share"])),
    ]
    words = (
        f"{figures['images']} images ({figures['bare_images']} of them for the bare loop), "
        f"{figures['threads']} threads."
    )
    if figures["options"]:
        words += f" Job options: {', '.join(figures['options'])}."
    return [*lines, words, "", *_table(("figure", "measured"), rows), ""]


def _plan(section: Any) -> list[str]:
    lines = _head(
        "Plan against actual",
        section,
        "What `--plan` says of a folder of files after trying a sample, and what the run then took.",
    )
    if not section:
        return lines
    figures = section["figures"]
    rows = [
        (each["what"], f"{each['planned']:g}", f"{each['actual']:g}", _signed(each["error"]))
        for each in figures["comparisons"]
    ]
    words = (
        f"{figures['images']} images, {figures['threads']} threads; slowest by plan: {figures['bottleneck']}."
    )
    return [*lines, words, "", *_table(("figure", "planned", "actual", "actual against plan"), rows), ""]


def _figures(sections: Record, name: str) -> Any:
    return sections[name]["figures"] if name in sections else None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(cell: Any) -> str:
    if isinstance(cell, dict):
        return f"{cell['median']:g} ({cell['min']:g} to {cell['max']:g})"
    return NOT_MEASURED if cell is None else str(cell)


def _share(cell: Any) -> str:
    value = cell["median"] if isinstance(cell, dict) else cell
    return f"{value:.1%}" if isinstance(value, float | int) else str(value or NOT_MEASURED)


def _signed(value: Any) -> str:
    return f"{value:+.1%}" if isinstance(value, float | int) else ""


def _times(value: Any) -> str:
    return f"{value:.2f}x" if isinstance(value, float | int) else str(value or NOT_MEASURED)
