"""What a run found, with everything needed to run it again."""

from __future__ import annotations

import importlib
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hired.devices import describe_hardware
from hired.errors import ConfigurationError
from hired.families.checkpoint import num_parameters
from pipeline.benchmark.measure import digits
from pipeline.benchmark.page import page
from pipeline.benchmark.subject import Options, Subject
from pipeline.manifest import versions
from pipeline.storage import Store

SECTION_MODULES = {
    "engine": "generation",
    "latency": "latency",
    "encoder": "encoding",
    "stages": "stages",
    "ray": "corpus",
    "plan": "planning",
}


def run(options: Options, command: str) -> Path:
    """Measures the sections that the options name; the Markdown page, with the record as JSON beside it.

    The files are written after every section, so a run that is broken off keeps what it has.
    """
    stem = options.output / f"benchmark-{Path(options.model).name}"
    before = _to_add_to(stem.with_suffix(".json")) if options.add else {}
    subject = Subject(options)
    record = surroundings(subject, command)
    if before:
        _check_same(before, record)
        record["sections"] = before["sections"]
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.sections:
        subject.measure_ceilings()
        record["ceilings"] = _ceilings(subject)
        module = importlib.import_module(f"pipeline.benchmark.{SECTION_MODULES[name]}")
        record["sections"][name] = {
            "command": command,
            "commit": record["commit"],
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "figures": module.measure(subject),
        }
        store = Store(stem.parent)
        store.write(f"{stem.name}.json", (json.dumps(record, indent=2) + "\n").encode())
        store.write(f"{stem.name}.md", page(record).encode())
    return stem.with_suffix(".md")


def surroundings(subject: Subject, command: str) -> dict[str, Any]:
    """The record without sections."""
    known = versions()
    return {
        "model": subject.options.model,
        "command": command,
        "commit": commit(),
        "hardware": describe_hardware(subject.device),
        "device": str(subject.device),
        "versions": {name: known[name] for name in ("python", "torch", "transformers", "ray")},
        "dtype": str(subject.dtype).removeprefix("torch."),
        "threads": subject.options.threads,
        "parameters": num_parameters(subject.path),
        "options": {name: _plain(getattr(subject.options, name)) for name in Options.__dataclass_fields__},
        "ceilings": _ceilings(subject),
        "sections": {},
    }


def _ceilings(subject: Subject) -> dict[str, float]:
    return {
        "tflops_per_s": digits(subject.ceilings.flops_per_s / 1e12),
        "gb_per_s": digits(subject.ceilings.bytes_per_s / 1e9),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _to_add_to(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _check_same(before: dict[str, Any], record: dict[str, Any]) -> None:
    """Sections of one record must have been measured on the same ground."""
    for name in ("model", "hardware", "versions", "dtype", "threads"):
        if before[name] != record[name]:
            raise ConfigurationError(
                f"--add: the record there has {name} {before[name]}, this run {record[name]}; "
                "name another --output"
            )


def commit() -> str:
    """What git calls this tree; "unknown" outside of one."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return git.stdout.strip() or "unknown"
