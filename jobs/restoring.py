"""Was something needed thrown away? Gives dropped tokens back, group by group, and writes what that changed.

    python jobs/restoring.py --output docs/results/accuracy
    python jobs/restoring.py --input tasks.parquet --model llava-hf/llava-v1.6-vicuna-7b-hf --output out

Without ``--input`` the questions are about painted scenes that the embedded model has never seen. A parquet
file needs the columns ``image`` (bytes, or a struct with bytes) and ``question``; ``answers`` (a text, or a
list whose first is taken), ``task``, ``picture`` and ``key`` may be there. A question without an answer is
measured by what the model says with all tokens. Writes restoring.md and restoring.png.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

import pyarrow.parquet as pq

import hired
from hired import policies
from hired.errors import ConfigurationError, ImageError
from hired.evaluation import restoring, restoring_page
from hired.evaluation.restoring import Question

log = logging.getLogger(__name__)

# Questions of painted scenes whose answers hang on a few patches.
TASKS = ("read", "chart", "colour", "shape")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        page = run(options, shlex.join(["python", "jobs/restoring.py", *arguments]))
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    print(page.read_text(encoding="utf-8"))
    return 0


def run(options: argparse.Namespace, command: str) -> Path:
    """The page that was written."""
    vlm = hired.load(options.model, device=options.device, dtype=options.dtype)
    asked = from_parquet(vlm, options.input) if options.input else painted(vlm, options.seed)
    questions = list(itertools.islice(asked, options.questions))
    if not questions:
        raise ConfigurationError(f"{options.input} holds no question")
    results = []
    for rate in options.budgets:
        results.append(
            restoring.restore(
                vlm,
                questions,
                budget=hired.Budget(rate=rate, alpha=options.alpha),
                policy=policies.get(options.policy),
                block=options.block,
            )
        )
        log.info("%g of the tokens: %d groups given back", rate, len(results[-1].groups))
    options.output.mkdir(parents=True, exist_ok=True)
    restoring_page.plot(results, options.output / "restoring.png")
    page: Path = options.output / "restoring.md"
    page.write_text(
        restoring_page.page(results, command=command, model=str(options.model), picture="restoring.png"),
        encoding="utf-8",
    )
    return page


def painted(vlm: hired.VLM, seed: int) -> Iterator[Question]:
    """Endless questions about unseen scenes, one of each task that a scene has."""
    from hired.embedded.examination import held_out_scenes
    from hired.embedded.questions import ask

    rng = random.Random(seed)
    for number, scene in enumerate(held_out_scenes(sys.maxsize, seed)):
        partitions = vlm.partition(scene.image)
        for task in TASKS:
            for asked in itertools.islice((each for each in ask(scene, rng) if each.task == task), 1):
                yield Question(f"{number}-{task}", task, str(number), partitions, asked.text, asked.answer)


def from_parquet(vlm: hired.VLM, path: Path) -> Iterator[Question]:
    """The rows of a file. Raises ConfigurationError where it cannot be read or lacks a column."""
    try:
        rows = pq.ParquetFile(path).iter_batches(batch_size=64)
        names = set(pq.read_schema(path).names)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is no parquet file that can be read ({error})") from error
    if missing := {"image", "question"} - names:
        raise ConfigurationError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    number = 0
    for batch in rows:
        for row in batch.to_pylist():
            yield _question(vlm, row, number)
            number += 1


def _question(vlm: hired.VLM, row: dict[str, Any], number: int) -> Question:
    image, answer = row["image"], row.get("answers")
    try:
        partitions = vlm.partition(image["bytes"] if isinstance(image, dict) else image)
    except ImageError as error:
        raise ConfigurationError(f"the image of row {number} cannot be used: {error}") from error
    return Question(
        key=str(row.get("key", number)),
        task=str(row.get("task", "all")),
        picture=str(row.get("picture", number)),
        partitions=partitions,
        prompt=row["question"],
        answer=answer[0] if isinstance(answer, list) and answer else answer or None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="embedded", help="embedded, a checkpoint's folder, or a hub id")
    parser.add_argument("--input", type=Path, help="parquet file of questions; painted scenes without one")
    parser.add_argument("--output", type=Path, required=True, help="folder of restoring.md and restoring.png")
    parser.add_argument("--questions", type=int, default=100, help="how many questions at most [100]")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.05], help="rates [0.2 0.05]")
    parser.add_argument("--alpha", type=float, default=0.5, help="the full-image's share [0.5]")
    parser.add_argument("--policy", default="hired", help="a policy that drops tokens [hired]")
    parser.add_argument(
        "--block", type=int, default=restoring.BLOCK, help="patches along a side of a group [3]"
    )
    parser.add_argument("--seed", type=int, default=9001, help="of the painted scenes [9001]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU if there is one")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 [float32]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
