"""How much do captions of your own images change when tokens are dropped? No labels are needed.

    python jobs/fidelity.py --input photos --model llava-hf/llava-v1.6-vicuna-7b-hf --output output/fidelity

Compares captions at each budget with those of all tokens: the same caption, the same words, and how likely
keep-all's caption is under the tokens that are left. Suggests the smallest budget within the tolerance.
``--input`` is all that ``jobs/caption_corpus.py`` takes: a folder, a glob, tars, parquet, JSON lines, S3.
Images that cannot be used are counted and named. Writes fidelity.md and fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from pydantic import TypeAdapter, ValidationError

import hired
from hired import policies
from hired.errors import ConfigurationError
from hired.evaluation.fidelity import TOLERANCE, Fidelity, Refused, fidelity, page
from pipeline.columns import Failure
from pipeline.config import TokenBudget
from pipeline.reading import ReadOptions, read
from pipeline.rows import Item, to_items
from pipeline.samples import samples
from pipeline.sources import ScanOptions, scan


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        written = run(_parser().parse_args(arguments), shlex.join(["python", "jobs/fidelity.py", *arguments]))
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    print(written.read_text(encoding="utf-8"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="folder, glob, file or S3 URI of images")
    parser.add_argument("--output", type=Path, required=True, help="folder of the page and its figures")
    parser.add_argument("--model", default="embedded", help="embedded, a checkpoint's folder, or a hub id")
    parser.add_argument("--prompt", default="Describe the image.", help="what every image is asked")
    parser.add_argument("--policy", default="hired", help="how tokens are chosen [hired]")
    parser.add_argument("--alpha", type=float, default=0.5, help="the full-image's share [0.5]")
    parser.add_argument(
        "--budgets", nargs="+", default=["0.6", "0.4", "0.2", "0.1", "0.05"],
        help="with a decimal point rates, without one numbers of tokens [0.6 0.4 0.2 0.1 0.05]",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"by how much less likely a token of keep-all's caption may become, on average [{TOLERANCE}]",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=200, help="how many, evenly spread [200]")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens a caption [64]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; as the device likes it")
    return parser


def run(options: argparse.Namespace, command: str) -> Path:
    """The page that was written; raises ConfigurationError."""
    if not 0 < options.tolerance < 1:
        raise ConfigurationError(f"--tolerance {options.tolerance}: give a share between 0 and 1, e.g. 0.05")
    budgets = [_budget(text, options.alpha) for text in options.budgets]
    policy = policies.get(options.policy)
    items = evenly(options.input, options.images)
    vlm = hired.load(options.model, device=options.device, dtype=options.dtype)
    result = fidelity(
        vlm, _images(items), options.prompt, budgets, policy, max_new_tokens=options.max_new_tokens
    )
    options.output.mkdir(parents=True, exist_ok=True)
    written: Path = options.output / "fidelity.md"
    written.write_text(
        page(result, command=command, model=str(options.model), tolerance=options.tolerance), encoding="utf-8"
    )
    record = _record(result, options.tolerance) | {"model": str(options.model), "command": command}
    (options.output / "fidelity.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return written


def evenly(source: str, count: int) -> list[Item]:
    """``count`` rows of an input, from the first to the last; raises ConfigurationError without any."""
    if count < 1:
        raise ConfigurationError(f"--images {count}: give 1 or more")
    items = [item for table in scan(source, ScanOptions()) for item in to_items(table)]
    return [items[number] for number in sorted(samples(len(items), count))]


def _images(items: Sequence[Item]) -> Iterator[tuple[str, bytes | Refused]]:
    for item, image in zip(items, read(items, ReadOptions()), strict=True):
        yield item.key, Refused(item.key, image.error) if isinstance(image, Failure) else image


def _budget(text: str, alpha: float) -> hired.Budget:
    try:
        value = TypeAdapter(TokenBudget).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"--budgets {text}: {reason}") from error
    if isinstance(value, float):
        return hired.Budget(rate=value, alpha=alpha)
    return hired.Budget(tokens=int(value), alpha=alpha)


def _record(result: Fidelity, tolerance: float) -> dict[str, object]:
    """Everything that was measured, image by image."""
    suggestion = result.suggestion(tolerance)
    return {
        "policy": result.policy,
        "prompt": result.prompt,
        "tolerance": tolerance,
        "suggestion": None if suggestion is None else asdict(suggestion),
        "refused": [asdict(each) for each in result.refused],
        "budgets": [
            {
                "budget": asdict(at.budget),
                "mean_visual_tokens": at.mean_tokens,
                "exact": asdict(at.exact),
                "f1": asdict(at.f1),
                "change_nats_per_token": asdict(at.change),
                "images": [asdict(image) for image in at.images],
            }
            for at in result.budgets
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
