"""What a finished run says about itself: ``OUTPUT/manifest.json``, written last, so it means "complete"."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.costs import StageCost

MANIFEST = "manifest.json"
PACKAGES = ("hired", "torch", "transformers", "ray", "pyarrow", "pillow", "numpy")
FINGERPRINTED = ("*.safetensors", "*.json", "*.jinja", "*.model")


class Record(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Record):
    """Which weights spoke: a name can move to other weights, the sha256 of the files cannot."""

    name: str
    sha256: str
    files: dict[str, str]


class Counts(Record):
    """Rows in and rows out; ``dead_letters_by_error`` is keyed by stage and error type, ``read: OSError``."""

    rows: int
    captions: int
    dead_letters: int
    dead_letters_by_error: dict[str, int]


class Tokens(Record):
    """Tokens of all captioned images, newlines included; ``visual_full`` is what keep-all would have sent."""

    visual_full: int
    visual_kept: int
    prompt: int
    completion: int


class Manifest(Record):
    """All of it."""

    run_id: str
    started_at: datetime
    finished_at: datetime
    wall_s: float
    configuration: dict[str, Any]
    versions: dict[str, str]
    model: Model
    cluster: dict[str, float]
    counts: Counts
    tokens: Tokens
    stages: dict[str, StageCost]

    def write(self, output: Path) -> Path:
        """The file, which appears whole or not at all."""
        return write_atomically(output / MANIFEST, self.model_dump_json(indent=2) + "\n")


def read_manifest(output: Path) -> Manifest:
    return Manifest.model_validate_json((output / MANIFEST).read_text(encoding="utf-8"))


def write_atomically(file: Path, text: str) -> Path:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
    return file


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
