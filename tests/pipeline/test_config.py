"""The configuration tree: where values come from, and how mistakes are answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hired.budget import Budget
from hired.errors import ConfigurationError
from pipeline import config
from pipeline.config import Config, from_command_line, from_tree

REQUIRED = ["--input", "photos", "--output", "out"]


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        "input: from-yaml\noutput: out\ntoken_budget: 576\nencode:\n  batch_size: 3\n  threads: 2\n"
    )
    return file


def test_defaults_need_only_input_and_output() -> None:
    parsed = from_command_line(REQUIRED)
    assert (parsed.input, parsed.output, parsed.model) == ("photos", "out", "embedded")
    assert parsed.budget == Budget(rate=0.2, alpha=0.5)


def test_flags_override_the_yaml_file_which_overrides_the_defaults(yaml_file: Path) -> None:
    parsed = from_command_line(
        ["--config", str(yaml_file), "--input", "from-flag", "--encode.batch-size", "5"]
    )
    assert parsed.input == "from-flag"
    assert parsed.token_budget == 576
    assert (parsed.encode.batch_size, parsed.encode.threads) == (5, 2)
    assert parsed.generate == Config(input="x", output="y").generate


def test_a_switch_needs_no_value() -> None:
    assert from_command_line([*REQUIRED, "--autoscaling"]).autoscaling
    assert not from_command_line([*REQUIRED, "--autoscaling", "false"]).autoscaling


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ("0.2", Budget(rate=0.2)),
        ("1.0", Budget(rate=1.0)),
        ("1e-2", Budget(rate=0.01)),
        ("576", Budget(tokens=576)),
        ("2", Budget(tokens=2)),
    ],
)
def test_a_budget_with_a_decimal_point_is_a_rate_and_without_one_a_count(
    written: str, budget: Budget
) -> None:
    assert from_command_line([*REQUIRED, "--token-budget", written]).budget == budget
    number = yaml.safe_load(written.replace("1e-2", "0.01"))
    assert from_tree({"input": "x", "output": "y", "token_budget": number}).budget == budget


@pytest.mark.parametrize("written", ["1", "0", "0.0", "1.5", "-0.2", "-3", "nan", "inf", "many", "true", ""])
def test_a_budget_that_means_nothing_or_two_things_is_refused(written: str) -> None:
    with pytest.raises(ConfigurationError, match="token_budget"):
        from_command_line([*REQUIRED, f"--token-budget={written}"])


@pytest.mark.parametrize("value", [1, True, None, [0.2], 0])
def test_such_a_budget_is_refused_from_yaml_too(value: object) -> None:
    with pytest.raises(ConfigurationError, match="token_budget"):
        from_tree({"input": "x", "output": "y", "token_budget": value})


@given(st.floats(0, 1, exclude_min=True) | st.integers(2, 100_000))
def test_a_budget_survives_the_manifest_and_a_yaml_file(budget: float) -> None:
    original = Config(input="x", output="y", token_budget=budget)
    tree = original.model_dump(mode="json")
    for again in (json.loads(json.dumps(tree)), yaml.safe_load(yaml.safe_dump(tree))):
        restored = from_tree(again)
        assert restored == original
        assert type(restored.token_budget) is type(budget)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--token-bugdet", "0.2"], r"--token-bugdet; did you mean --token-budget\?"),
        (["--encode.batchsize=2"], r"--encode.batchsize; did you mean --encode.batch-size\?"),
        (["--tok", "0.2"], "--tok"),
        (["photos"], "photos"),
        (["--max-new-tokens", "many"], "max_new_tokens: .*integer.*'many'"),
        (["--max-new-tokens", "0"], "max_new_tokens: .*greater than 0"),
        (["--device", "tpu"], "device: .*'auto', 'cpu' or 'cuda'"),
        (["--alpha", "1.5"], "alpha: "),
        (
            ["--encode.min-actors", "3", "--encode.max-actors", "2"],
            "encode: max_actors 2 is below min_actors 3",
        ),
        (["--prompt"], "--prompt"),
    ],
)
def test_a_wrong_flag_is_named_with_its_mend(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        from_command_line([*REQUIRED, *arguments])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("token_bugdet: 0.2", r"'token_bugdet'; did you mean token_budget\?"),
        ("encode: {batch_sise: 2}", r"'encode.batch_sise'; did you mean encode.batch_size\?"),
        ("zzz: 1", "'zzz'; --help lists all"),
        ("encode: 3", "encode"),
        ("- a\n- b", "keys and values"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_its_mend(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        from_command_line([*REQUIRED, "--config", str(tmp_path / "run.yaml"), "--encode.threads", "1"])


def test_a_yaml_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml"):
        from_command_line(["--config", "absent.yaml"])


def test_what_is_required_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"--input is required.*--output is required"):
        from_command_line([])


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        from_command_line(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--token-budget", "--alpha", "--policy", "--generate.num-gpus", "--config"):
        assert flag in text


def test_the_documentation_is_current() -> None:
    page = Path(config.__file__).parents[1] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == config.reference() + "\n", "run: make docs"


@pytest.mark.parametrize(
    ("flag", "expected"), [(";", (";",)), ("[a]", ("a",)), ('[".", "a b"]', (".", "a b")), ("[", None)]
)
def test_stop_takes_one_text_or_a_list(flag: str, expected: tuple[str, ...] | None) -> None:
    flags = ["--input", "in", "--output", "out", "--stop", flag]
    if expected is None:
        with pytest.raises(ConfigurationError, match="stop"):
            config.from_command_line(flags)
    else:
        assert config.from_command_line(flags).stop == expected


def test_arguments_of_vllm_are_passed_through() -> None:
    flags = [
        "--input",
        "in",
        "--output",
        "out",
        "--engine.vllm",
        "{tensor_parallel_size: 2, quantization: fp8}",
    ]
    options = config.from_command_line(flags).engine.options(num_gpus=0.5)
    assert options.vllm == {"tensor_parallel_size": 2, "quantization": "fp8"}
    assert options.memory_fraction == pytest.approx(0.45)


def test_every_option_stands_in_one_group_of_the_help() -> None:
    grouped = [name for names in config.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Config.model_fields)


def test_options_of_no_consequence_may_change_when_a_run_goes_on() -> None:
    assert set(Config.model_fields) >= config.OPERATIONAL
    before = Config(input="x", output="y").model_dump(mode="json")
    same = Config(input="x", output="z", batch_timeout_s=5, encode=config.EncodePool(batch_size=3))
    assert config.differences(before, same.model_dump(mode="json")) == []
    other = Config(input="x", output="y", prompt="Why?", token_budget=0.4).model_dump(mode="json")
    assert config.differences(before, other) == [
        "--prompt was 'Describe the image.' and is 'Why?'",
        "--token-budget was 0.2 and is 0.4",
    ]


def test_a_prompt_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("What is it?\n")
    [question] = Config(input="x", output="y", prompt=f"@{file}").questionnaire().questions
    assert question.prompt == "What is it?"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Config(input="x", output="y", prompt="@absent.txt").questionnaire()


@pytest.mark.parametrize("given", ["url,license", "[url, license]"])
def test_names_may_be_given_with_commas_or_in_brackets(given: str) -> None:
    assert from_command_line(["--input=x", "--output=y", f"--keep-columns={given}"]).keep_columns == (
        "url",
        "license",
    )


def test_json_is_short_for_a_summary_in_json() -> None:
    assert from_command_line(["--input=x", "--output=y", "--json"]).summary == "json"
