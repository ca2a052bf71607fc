"""What is asked: placeholders, files of prompts, and rows that set their own parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hired.errors import ConfigurationError
from pipeline.questions import (
    Question,
    QuestionError,
    Questionnaire,
    filled,
    from_json,
    placeholders,
    read_prompts,
    to_json,
)


def question(prompt: str = "What is it?", **other: Any) -> Question:
    fields = {
        "number": 0,
        "id": "default",
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stop": (),
    }
    return Question(prompt=prompt, **fields | other)


def test_names_in_braces_stand_for_columns_and_other_braces_stay() -> None:
    prompt = 'Q: {question} in {{braces}} as {"a": 1}, {}, {two words}'
    assert placeholders(prompt) == ["question"]
    assert filled(prompt, {"question": "why {x}?"}) == 'Q: why {x}? in {braces} as {"a": 1}, {}, {two words}'


@pytest.mark.parametrize("row", [{}, {"question": None}])
def test_a_row_without_what_its_prompt_names_fails_by_that_name(row: dict[str, Any]) -> None:
    with pytest.raises(QuestionError, match="'question'"):
        filled("{question}", row)


def test_several_prompts_share_the_defaults_and_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("- {id: short, prompt: Name it., max_new_tokens: 3}\n- {id: long, prompt: Tell all.}\n")
    short, long = read_prompts(file, question(temperature=0.5))
    assert (short.number, short.id, short.max_new_tokens, short.temperature) == (0, "short", 3, 0.5)
    assert (long.number, long.id, long.max_new_tokens, long.temperature) == (1, "long", 8, 0.5)
    file.write_text("short: Name it.\nlong: Tell all.\n")
    assert [each.id for each in read_prompts(file, question())] == ["short", "long"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "- {id: a}",
        "- {id: a, prompt: x}\n- {id: a, prompt: y}",
        "- {id: a, prompt: x, temp: 1}",
        "{",
    ],
)
def test_a_file_of_prompts_that_makes_no_sense_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"prompts\.yaml"):
        read_prompts(file, question())


def test_a_row_sets_its_own_parameters_where_it_has_any() -> None:
    asked = Questionnaire([question("{what}?")], ["max_new_tokens", "stop"])
    assert asked.columns == ("what", "max_new_tokens", "stop")
    [own] = asked.of({"what": "Who", "max_new_tokens": 2, "stop": "."})
    assert (own.prompt, own.max_new_tokens, own.stop) == ("Who?", 2, (".",))
    [default] = asked.of({"what": "Who", "max_new_tokens": None, "stop": None})
    assert (default.max_new_tokens, default.stop) == (8, ())
    with pytest.raises(QuestionError, match="max_new_tokens"):
        asked.of({"what": "Who", "max_new_tokens": -1, "stop": None})
    with pytest.raises(ConfigurationError, match="colour"):
        Questionnaire([question()], ["colour"])


def test_questions_survive_their_column() -> None:
    questions = [question(stop=("a", "b")), question("é", number=1, id="x", temperature=0.3)]
    assert from_json(to_json(questions)) == questions
