"""The small model that ships with the project, and the painted world that it was trained on."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
