"""The model ``hired`` of lmms-eval, which finds it by its entry point; see docs/lmms-eval.md."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: where the class for each of its two interfaces lies."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="hired",
        simple_class_path="hired.lmms_eval.model.HiredSimple",
        chat_class_path="hired.lmms_eval.model.HiredChat",
    )
