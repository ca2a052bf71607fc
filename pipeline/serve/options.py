"""The settings as flags, as a YAML file, and as a page of documentation.

``python -m pipeline.serve.options`` prints the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hired.errors import ConfigurationError
from pipeline.flags import Parser, add_flag, flag, leaves, meaning, put, read_yaml
from pipeline.serve.settings import Settings

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the endpoint listens."""

    host: str = LOOPBACK
    port: int = 8000


def from_command_line(arguments: Sequence[str] | None = None) -> tuple[Settings, Address]:
    """What flags, YAML file and defaults give together, the flags first; raises ConfigurationError."""
    parser = Parser(description="Serve a model over OpenAI's API.", allow_abbrev=False)
    parser.add_argument("--host", default=LOOPBACK, help=f"address to listen on [{LOOPBACK}]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with the keys of the flags below"
    )
    for name, field in leaves(Settings):
        add_flag(parser, name, field, _default(field))
    given = vars(parser.parse_args(arguments))
    address = Address(given.pop("host"), given.pop("port"))
    if not 0 <= address.port < 2**16:
        raise ConfigurationError(f"--port {address.port} is none; give one up to 65535")
    file = given.pop("config")
    tree = read_yaml(file) if file else {}
    for name, value in given.items():
        if value is not None:
            put(tree, name, value, example="images: 8")
    return from_tree(tree), address


def from_tree(tree: dict[str, Any]) -> Settings:
    """The settings of a nested mapping; raises ConfigurationError that names every wrong key."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError("; ".join(map(_explain, error.errors()))) from error


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
        f"| `{flag(name)}` | `{name}` | {_default(field)} | {meaning(field)} |"
        for name, field in leaves(Settings)
    ]
    return PAGE + "\n".join(["| flag | YAML key | default | meaning |", "|---|---|---|---|", *rows])


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; --help lists all"
    got = f" (got {error['input']!r})" if isinstance(error["input"], str | int | float) else ""
    said = error["msg"].removeprefix("Value error, ") + got
    return f"{name}: {said}" if name else said


def _default(field: FieldInfo) -> str:
    empty = (None, ())
    return "none" if field.default in empty else str(field.default)


if __name__ == "__main__":
    print(reference())
