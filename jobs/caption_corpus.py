"""Caption a corpus of images: parse, run, report.

    python jobs/caption_corpus.py --input photos --output output/photos --token-budget 0.2
    ray job submit --working-dir . -- python jobs/caption_corpus.py --input ... --output ...

The same command goes on with a run that was ended, however it ended. Exit codes: 0 when every row is in
exactly one of the two tables; 2 for a configuration error; 75 when the run was asked to end (SIGTERM, Ctrl-C)
and can go on; 1 otherwise.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from pipeline.config import Config, from_command_line
from pipeline.plan import describe
from pipeline.planning import plan_corpus
from pipeline.report import summary, summary_json
from pipeline.run import Interrupted, caption_corpus, dry_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = from_command_line(arguments)
        with redirect_stdout(sys.stderr):  # Ray prints its workers' words to stdout, which is the summary's
            said = run(config, shlex.join(["python", "jobs/caption_corpus.py", *arguments]))
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        print("ended before all rows were done; the same command goes on", file=sys.stderr)
        return os.EX_TEMPFAIL
    except Exception:
        logging.getLogger(__name__).exception(
            "the run failed; the same command goes on from what is committed"
        )
        return 1
    print(said)
    return 0


def run(config: Config, command: str) -> str:
    """What is to be printed in the end."""
    if config.dry_run:
        return "\n".join(f"{name}: {count}" for name, count in dry_run(config, command).items())
    if config.plan:
        plan = plan_corpus(config, command)
        return plan.model_dump_json(indent=2) if config.summary == "json" else describe(plan)
    manifest = caption_corpus(config, command)
    return summary_json(manifest) if config.summary == "json" else summary(manifest, config.output)


if __name__ == "__main__":
    sys.exit(main())
