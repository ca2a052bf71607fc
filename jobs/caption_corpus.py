"""Caption a corpus of images: parse, run, report.

    python jobs/caption_corpus.py --input photos --output output/photos --token-budget 0.2
    ray job submit --working-dir . -- python jobs/caption_corpus.py --input ... --output ...

Exit code 0 when every row is in exactly one of the two tables, 2 for a configuration error, 1 otherwise.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from pipeline.config import from_command_line
from pipeline.report import summary
from pipeline.run import caption_corpus


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = from_command_line(arguments)
        with redirect_stdout(sys.stderr):  # Ray prints its workers' words to stdout, which is the summary's
            manifest = caption_corpus(config)
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Exception:
        logging.getLogger(__name__).exception("the run failed")
        return 1
    print(summary(manifest, config.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
