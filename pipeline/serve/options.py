"""The settings as flags, as a YAML file, and as a page of documentation.

``python -m pipeline.serve.options`` prints the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hired.errors import ConfigurationError
from pipeline.config import Tree
from pipeline.serve.settings import Settings

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the endpoint listens."""

    host: str = LOOPBACK
    port: int = 8000


class _Parser(argparse.ArgumentParser):
    """Reports like everything else: by a ConfigurationError."""

    def error(self, message: str) -> Any:
        raise ConfigurationError(message)


def from_command_line(arguments: Sequence[str] | None = None) -> tuple[Settings, Address]:
    """What flags, YAML file and defaults give together, the flags first; raises ConfigurationError."""
    parser = _Parser(description="Serve a model over OpenAI's API.", allow_abbrev=False)
    parser.add_argument("--host", default=LOOPBACK, help=f"address to listen on [{LOOPBACK}]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with the keys of the flags below"
    )
    for name, field in leaves(Settings):
        optional: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(
            flag(name),
            dest=name,
            metavar=name.rpartition(".")[2].upper(),
            help=f"{_meaning(field)} [{_default(field)}]".replace("%", "%%"),
            **optional,
        )
    given = vars(parser.parse_args(arguments))
    address = Address(given.pop("host"), given.pop("port"))
    if not 0 <= address.port < 2**16:
        raise ConfigurationError(f"--port {address.port} is none; give one up to 65535")
    file = given.pop("config")
    tree = _read(file) if file else {}
    for name, value in given.items():
        if value is not None:
            _put(tree, name.split("."), value)
    return from_tree(tree), address


def from_tree(tree: dict[str, Any]) -> Settings:
    """The settings of a nested mapping; raises ConfigurationError that names every wrong key."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError("; ".join(map(_explain, error.errors()))) from error


def leaves(tree: type[Tree], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted names and fields of all settings that hold a value of their own."""
    for name, field in tree.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Tree):
            yield from leaves(below, f"{above}{name}.")
        else:
            yield above + name, field


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


PAGE = """# Settings of the endpoint

Every setting is a flag of `jobs/serve.py`, a key of the YAML file given by `--config`, and a key of `args` in
`serve.yaml`. Flags override the file, the file overrides the defaults, and an unknown key is an error. Beside
them `jobs/serve.py` takes `--host` (127.0.0.1) and `--port` (8000). `make docs` writes this page, from
`pipeline/serve/settings.py`; what the endpoint does with them is told in [serving.md](serving.md).

A token budget with a decimal point is a rate of the image's tokens, one without is a number of tokens.
CPUs, GPUs and threads that are `none` are settled from the machine or cluster when the endpoint starts.

"""


def reference() -> str:
    """The documentation of every setting, a page of Markdown."""
    rows = [
        f"| `{flag(name)}` | `{name}` | {_default(field)} | {_meaning(field)} |"
        for name, field in leaves(Settings)
    ]
    return PAGE + "\n".join(["| flag | YAML key | default | meaning |", "|---|---|---|---|", *rows])


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigurationError(f"--config {file} must hold keys and values such as 'token_budget: 0.2'")
    return tree or {}


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *levels, leaf = path
    for level in levels:
        tree = tree.setdefault(level, {})
        if not isinstance(tree, dict):
            raise ConfigurationError(f"{level} must hold keys and values such as 'images: 8'")
    tree[leaf] = value


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; --help lists all"
    got = f" (got {error['input']!r})" if isinstance(error["input"], str | int | float) else ""
    said = error["msg"].removeprefix("Value error, ") + got
    return f"{name}: {said}" if name else said


def _meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{field.description} ({', '.join(choices)})" if choices else str(field.description)


def _default(field: FieldInfo) -> str:
    empty = (None, ())
    return "none" if field.default in empty else str(field.default)


if __name__ == "__main__":
    print(reference())
