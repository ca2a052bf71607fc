"""Options as flags and YAML keys: of a pydantic tree, or of a flat dataclass.

What the options are and mean stands with them; here is only how they are written and read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from hired.errors import ConfigurationError

# Of one flag: what argparse is told of its value, and what the option means.
Told = tuple[dict[str, Any], str]


class Tree(BaseModel):
    """A level of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Parser(argparse.ArgumentParser):
    """Reports like everything else: by a ConfigurationError."""

    def error(self, message: str) -> Any:
        raise ConfigurationError(message)


def leaves(tree: type[Tree], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted names and fields of all options that hold a value of their own."""
    for name, field in tree.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Tree):
            yield from leaves(below, f"{above}{name}.")
        else:
            yield above + name, field


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def meaning(field: FieldInfo) -> str:
    """What an option means, with the values that it may have where they are few."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{field.description} ({', '.join(choices)})" if choices else str(field.description)


def add_flag(group: Any, name: str, field: FieldInfo, default: str) -> None:
    """A flag for an option of the tree, with its meaning; a bare one of a truth value means true."""
    optional_value: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
    group.add_argument(
        flag(name),
        dest=name,
        metavar=name.rpartition(".")[2].upper(),
        help=f"{meaning(field)} [{default}]".replace("%", "%%"),
        **optional_value,
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys of a file; raises ConfigurationError where there are none to be read."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigurationError(f"--config {file} must hold keys and values such as 'token_budget: 0.2'")
    return tree or {}


def put(tree: dict[str, Any], name: str, value: Any, *, example: str) -> None:
    """Set the leaf of a dotted name; raises ConfigurationError where a level above it holds a plain value."""
    *levels, leaf = name.split(".")
    for level in levels:
        below = tree.setdefault(level, {})
        if not isinstance(below, dict):
            raise ConfigurationError(f"{level} must hold keys and values such as {example!r}")
        tree = below
    tree[leaf] = value


def add_fields(parser: argparse.ArgumentParser, options: type, told: Mapping[str, Told]) -> None:
    """A flag for each field of a dataclass whose fields all have defaults."""
    for field in fields(options):
        how, means = told[field.name]
        parser.add_argument(
            flag(field.name), dest=field.name, default=field.default, help=f"{means} [{field.default}]", **how
        )


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, lists as tuples."""
    return {name: tuple(each) if isinstance(each, list) else each for name, each in vars(parsed).items()}
