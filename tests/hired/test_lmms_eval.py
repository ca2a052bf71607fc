"""The model ``hired`` inside lmms-eval itself, on a local task and without a network."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import hired
from hired.embedded.examination import held_out_scenes
from hired.embedded.questions import ask
from hired.errors import ConfigurationError, HiredError
from tests.pictures import picture
from tests.tiny import tiny_llava_next

PROJECT = Path(__file__).resolve().parents[2]
# Where `make setup` puts lmms-eval, apart from the packages that all tests see.
LMMS_EVAL = PROJECT / ".venv" / "lmms-eval"

FEATURES = {
    "image": {"_type": "Image"},
    "question": {"dtype": "string", "_type": "Value"},
    "answer": {"dtype": "string", "_type": "Value"},
}

COLUMNS = [
    ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("question", pa.string()),
    ("answer", pa.string()),
]

TASK = """
task: painted
dataset_path: parquet
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, until: ["\\n\\n"], temperature: 0, num_beams: 1, do_sample: false}
process_results: !function utils.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""

UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""

# Both interfaces in one process: lmms-eval takes ten seconds to be imported.
SCRIPT = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

folder, output = sys.argv[1:]
found = {}
for interface in ("simple", "chat"):
    told = simple_evaluate(
        model="hired",
        model_args="pretrained=embedded,token_budget=0.2,alpha=0.4,policy=hired",
        tasks=["painted"],
        batch_size=3,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        force_simple=interface == "simple",
        log_samples=True,
        bootstrap_iters=0,
    )
    found[interface] = {
        "right": told["results"]["painted"]["right,none"],
        "said": [sample["filtered_resps"] for sample in told["samples"]["painted"]],
    }
json.dump(found, open(output, "w"))
"""


def write_task(folder: Path) -> list[dict[str, Any]]:
    """A task of painted scenes as anybody would write one, and its rows."""
    rng, rows = random.Random(0), []
    for scene in held_out_scenes(4, seed=5):
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG")
        for question in ask(scene, rng):
            if question.task in ("read", "colour"):
                image = {"bytes": buffer.getvalue(), "path": None}
                rows.append({"image": image, "question": question.text, "answer": question.answer})
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    table = pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS, metadata=metadata))
    pq.write_table(table, folder / "painted.parquet")
    (folder / "painted.yaml").write_text(TASK.replace("FILE", str(folder / "painted.parquet")))
    (folder / "utils.py").write_text(UTILS)
    return rows


def write_entry_points(folder: Path) -> None:
    """The checkout's entry points as its installation would register them, whenever that was."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["lmms_eval.models"]
    information = folder / "hired_checkout-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hired-checkout\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in registered.items()]
    (information / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))


@pytest.mark.slow
def test_lmms_eval_gets_the_answers_that_the_model_gives_by_both_interfaces(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = write_task(tasks)
    write_entry_points(tmp_path / "site")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (PROJECT, LMMS_EVAL, tmp_path / "site"))),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, tmp_path / "script.py", tasks, tmp_path / "found.json"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())

    vlm = hired.load("embedded", device="cpu")
    images = [vlm.partition(row["image"]["bytes"]) for row in rows]
    tokens = vlm.encode(images, budget=hired.Budget(rate=0.2, alpha=0.4))
    captions = vlm.generate(tokens, [row["question"] for row in rows], max_new_tokens=16)
    expected = [caption.text for caption in captions]
    right = sum(text == row["answer"] for text, row in zip(expected, rows, strict=True)) / len(rows)
    assert right > 0.5
    for interface in ("simple", "chat"):
        assert [text for [text] in found[interface]["said"]] == expected
        assert found[interface]["right"] == pytest.approx(right)


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(LMMS_EVAL))
    from hired.lmms_eval import model

    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llava_next(tmp_path_factory.mktemp("checkpoint"), seed=1))


class Request:
    """What lmms-eval hands a model, as far as a model reads it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@cache
def loaded(interface: Any, tiny: str, **arguments: Any) -> Any:
    """A model, loaded once for all tests."""
    return interface(pretrained=tiny, device="cpu", **arguments)


def simple(module: Any, tiny: str, images: list[Any], options: dict[str, Any], **arguments: Any) -> list[Any]:
    """The answers to one question about each of the images."""
    model = loaded(module.HiredSimple, tiny, **arguments)
    model.task_dict = {"t": {"test": images}}
    requests = [
        Request("<image>\nWhat?", options, lambda image: [image], i, "t", "test") for i in range(len(images))
    ]
    return list(model.generate_until(requests))


def test_a_request_says_how_long_an_answer_may_be_and_where_it_stops(model_module: Any, tiny: str) -> None:
    [result] = simple(model_module, tiny, [picture()], {"max_new_tokens": 7})
    assert result.token_counts.output_tokens == 7
    [default] = simple(model_module, tiny, [picture()], {"until": []}, max_new_tokens=5)
    assert default.token_counts.output_tokens == 5
    word = result.text[2:4]
    [stopped] = simple(model_module, tiny, [picture()], {"max_new_tokens": 7, "until": [word]})
    assert stopped.text == result.text.partition(word)[0].strip()


def test_a_task_that_samples_is_sampled_and_one_that_forbids_it_is_not(model_module: Any, tiny: str) -> None:
    greedy = simple(model_module, tiny, [picture()], {"max_new_tokens": 9})
    hot = {"max_new_tokens": 9, "temperature": 5.0, "top_p": 1.0}
    assert simple(model_module, tiny, [picture()], hot) != greedy
    assert simple(model_module, tiny, [picture()], hot | {"do_sample": False}) == greedy


@pytest.mark.parametrize("size", [1, 2, "5"])
def test_answers_do_not_depend_on_the_batch_and_keep_their_order(
    model_module: Any, tiny: str, size: int | str
) -> None:
    images = [picture(60 + 20 * i, 60, noise=50) for i in range(4)]
    options = {"max_new_tokens": 6}
    together = simple(model_module, tiny, images, options, batch_size=size)
    assert together == [simple(model_module, tiny, [image], options)[0] for image in images]


def test_text_and_picture_of_a_message_are_asked_like_a_simple_request(model_module: Any, tiny: str) -> None:
    model = loaded(model_module.HiredChat, tiny)
    model.task_dict = {"t": {"test": [picture()]}}

    def messages(image: Image.Image) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": image}, {"type": "text", "text": "What?"}]
        return [{"role": "user", "content": parts}]

    options = {"max_new_tokens": 6}
    answers = model.generate_until([Request("ignored", messages, options, 0, "t", "test")])
    assert answers == simple(model_module, tiny, [picture()], options)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"token_budgets": 0.2}, "knows no token_budgets"),
        ({"token_budget": 1}, "write 1.0"),
        ({"policy": "hird"}, "hird"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
    ],
)
def test_arguments_that_mean_nothing_are_configuration_errors(
    model_module: Any, tiny: str, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        model_module.HiredSimple(pretrained=tiny, **arguments)


def test_a_number_of_tokens_or_a_rate_is_the_budget(model_module: Any) -> None:
    assert model_module._budget(576, 0.3) == hired.Budget(tokens=576, alpha=0.3)
    assert model_module._budget(1.0, 0.5) == hired.Budget(rate=1.0)


def test_several_processes_are_refused(model_module: Any, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="one process"):
        model_module.HiredSimple(pretrained=tiny)


def test_a_document_without_its_one_picture_is_named(model_module: Any, tiny: str) -> None:
    model = loaded(model_module.HiredSimple, tiny)
    model.task_dict = {"pages": {"test": [picture()]}}
    for visuals in ([], [picture(), picture()], ["video.mp4"]):
        request = Request("What?", {}, lambda _, found=visuals: found, 0, "pages", "test")
        with pytest.raises(ConfigurationError, match="document 0 of pages"):
            model.generate_until([request])


def test_a_conversation_is_refused(model_module: Any, tiny: str) -> None:
    model = loaded(model_module.HiredChat, tiny)
    model.task_dict = {"t": {"test": [0]}}
    messages = [{"role": role, "content": []} for role in ("user", "assistant", "user")]
    with pytest.raises(ConfigurationError, match="user, assistant, user"):
        model.generate_until([Request("", lambda _: messages, {}, 0, "t", "test")])


def test_a_question_that_cannot_be_answered_stops_the_evaluation(model_module: Any, tiny: str) -> None:
    with pytest.raises(HiredError, match=r"document 0 of t cannot be answered: .*context"):
        simple(model_module, tiny, [picture()], {"max_new_tokens": 10_000})
