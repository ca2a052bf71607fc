"""What a run says about itself: identity and sessions below ``_work``, and ``manifest.json`` at its end."""

from __future__ import annotations

import hashlib
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.costs import StageCost
from pipeline.plan import Plan
from pipeline.storage import Store
from pipeline.tally import Counts, Example, Histograms, Record, Tokens

MANIFEST = "manifest.json"
PACKAGES = ("hired", "torch", "transformers", "ray", "pyarrow", "pillow", "numpy")
FINGERPRINTED = ("*.safetensors", "*.json", "*.jinja", "*.model")


class Model(Record):
    """Which weights spoke: a name can move to other weights, the sha256 of the files cannot."""

    name: str
    sha256: str
    files: dict[str, str]


class Session(Record):
    """One go of a run, from its start to its end or to its kill.

    ``progress`` holds seconds since the start and rows done by then, in this go and before.
    """

    run_id: str
    started_at: datetime
    finished_at: datetime
    wall_s: float
    rows: int
    progress: list[tuple[float, int]]
    cluster: dict[str, float]


class Identity(Record):
    """What a run is: written at its first start, compared whenever it is resumed."""

    run_id: str
    started_at: datetime
    command: str
    configuration: dict[str, Any]
    model: Model
    versions: dict[str, str]


class Manifest(Record):
    """All of it. ``wall_s`` is the sum over the sessions that ended, ``duplicates`` what --dedup dropped."""

    run_id: str
    started_at: datetime
    finished_at: datetime
    wall_s: float
    command: str
    configuration: dict[str, Any]
    versions: dict[str, str]
    model: Model
    counts: Counts
    duplicates: int
    tokens: Tokens
    histograms: Histograms
    failures: dict[str, list[Example]]
    stages: dict[str, StageCost]
    sessions: list[Session]
    plan: Plan | None = None


def read_manifest(output: str | Path) -> Manifest:
    """That of a finished run, in a local folder or below an s3:// prefix."""
    return Manifest.model_validate_json(Store(output).read(MANIFEST))


def fingerprint(name: str, folder: Path) -> Model:
    """The sha256 of a checkpoint's weights, configuration, tokenizer and processor, each and in all."""
    files = sorted({file for pattern in FINGERPRINTED for file in folder.glob(pattern)})
    digests = {file.name: _sha256(file) for file in files}
    whole = hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode())
    return Model(name=name, sha256=whole.hexdigest(), files=digests)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree, as under `ray job submit`
        return "not installed"
