"""What is asked about an image: one question or several, from flags, a file, and a row's own columns.

All questions about an image share one decoding and one encoding. ``{name}`` in a prompt stands for the column
``name`` of the input; ``{{`` and ``}}`` are literal braces, and braces round anything else than a name stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hired.errors import ConfigurationError, HiredError

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
PARAMETERS = ("max_new_tokens", "temperature", "top_p", "seed", "stop")


class QuestionError(HiredError):
    """A row lacks what its question needs, or its parameters make no sense."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt about one image, and how to answer it; ``number`` counts the questions of a run."""

    number: int
    id: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


class _Entry(BaseModel):
    """One entry of a file of prompts; what it leaves out is as the flags say. Also a row's own parameters."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    max_new_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: tuple[str, ...] | None = None


class Questionnaire:
    """The questions of a run: ``of(row)`` fills in a row's columns.

    ``parameters`` names columns, among ``PARAMETERS``, whose values override the run's own row by row.
    """

    def __init__(self, questions: Sequence[Question], parameters: Sequence[str] = ()) -> None:
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            raise ConfigurationError(
                f"--row-parameters {', '.join(unknown)}: a row can set {', '.join(PARAMETERS)}"
            )
        self.questions = tuple(questions)
        self._parameters = tuple(parameters)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the input that rows must bring."""
        named = (name for each in self.questions for name in placeholders(each.prompt))
        return tuple(dict.fromkeys([*named, *self._parameters]))

    def of(self, row: Mapping[str, Any]) -> list[Question]:
        """The questions about one row; raises QuestionError."""
        given = {name: row[name] for name in self._parameters if row[name] is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        return [self._filled(question, row, given) for question in self.questions]

    @staticmethod
    def _filled(question: Question, row: Mapping[str, Any], given: Mapping[str, Any]) -> Question:
        prompt = filled(question.prompt, row)
        try:
            entry = _Entry.model_validate({"id": question.id, "prompt": prompt} | dict(given))
        except ValidationError as error:
            names = ", ".join(str(each["loc"][0]) for each in error.errors())
            raise QuestionError(f"the row's {names} cannot be used") from error
        return _from_entry(entry, replace(question, prompt=prompt))


def placeholders(prompt: str) -> list[str]:
    """The columns that a prompt names, in order."""
    return [match[1] for match in _PLACEHOLDER.finditer(prompt) if match[1]]


def filled(prompt: str, row: Mapping[str, Any]) -> str:
    """The prompt with a row's values in it; raises QuestionError where one is missing."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not name:
            return match[0][0]
        if row.get(name) is None:
            raise QuestionError(f"the row has no value in column {name!r}, which its prompt needs")
        return str(row[name])

    return _PLACEHOLDER.sub(value, prompt)


def read_prompts(file: Path, default: Question) -> list[Question]:
    """The questions of a YAML file: entries of ``id``, ``prompt`` and ``PARAMETERS``, or ``id: prompt``."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--prompts {file} cannot be read: {error}") from error
    if isinstance(content, dict):
        content = [{"id": str(name), "prompt": prompt} for name, prompt in content.items()]
    try:
        entries = TypeAdapter(list[_Entry]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(
            f"--prompts {file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write a list of "
            "entries such as '- {id: short, prompt: Describe the image.}'"
        ) from error
    ids = [entry.id for entry in entries]
    if not ids or len(set(ids)) < len(ids):
        raise ConfigurationError(f"--prompts {file}: needs one entry or more, each with an id of its own")
    return [_from_entry(entry, replace(default, number=number)) for number, entry in enumerate(entries)]


def _from_entry(entry: _Entry, default: Question) -> Question:
    return replace(
        default, **{name: value for name, value in entry.model_dump().items() if value is not None}
    )


def to_json(questions: Sequence[Question]) -> str:
    """The questions as one text, for a column."""
    return json.dumps([asdict(question) for question in questions])


def from_json(text: str) -> list[Question]:
    return [Question(**fields | {"stop": tuple(fields["stop"])}) for fields in json.loads(text)]
