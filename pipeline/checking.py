"""What can be found wrong with a configuration before anything is written or started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hired import families, policies
from hired.vlm import resolve
from pipeline.config import Config
from pipeline.opening import check_startable
from pipeline.sinks import check_columns
from pipeline.storage import Store


@dataclass(frozen=True)
class Checked:
    """What a run needs, found to be there before any worker starts."""

    config: Config
    checkpoint: Path
    store: Store


def check(config: Config) -> Checked:
    """The configuration with absolute paths; raises ConfigurationError for whatever needs no cluster.

    Nothing is written, and of a new run's input only the first rows are looked at.
    """
    config = located(config)
    checkpoint = check_model(config)
    check_columns(config.keep_columns, keep_images=config.keep_images)
    store = Store(config.output, config.storage)
    check_startable(config, store)
    return Checked(config, checkpoint, store)


def located(config: Config) -> Config:
    """The same with absolute paths: workers have other working directories."""
    paths = {name: _absolute(getattr(config, name)) for name in ("input", "output")}
    if config.model != "embedded" and Path(config.model).expanduser().is_dir():
        paths["model"] = _absolute(config.model)
    return config.model_copy(update=paths)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def check_model(config: Config) -> Path:
    """The checkpoint's folder; raises ConfigurationError for a model, policy or budget of no use."""
    checkpoint = resolve(config.model)
    families.tiling(checkpoint)
    policies.get(config.policy)
    _ = config.budget
    return checkpoint
