"""List a bucket or a folder once, into a manifest that jobs take as their input.

    python jobs/make_manifest.py --input s3://bucket/photos --output photos.parquet
    python jobs/caption_corpus.py --input photos.parquet --output output/photos

Broken off at any moment, the same command goes on where it stopped. Prints what the manifest holds as JSON.
Exit code 0 when the manifest is there, 2 for a configuration error, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from pipeline.listing import ListingOptions, make_manifest
from pipeline.sources import IMAGE_SUFFIXES
from pipeline.storage import StorageOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    given = _parser().parse_args(arguments)
    try:
        summary = make_manifest(_options(given))
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Exception:
        logging.getLogger(__name__).exception("the listing failed; the same command goes on with it")
        return 1
    print(json.dumps(asdict(summary)))
    return 0


def _options(given: argparse.Namespace) -> ListingOptions:
    storage = StorageOptions(given.s3_endpoint, given.s3_region, given.s3_anonymous, given.io_attempts)
    suffixes = frozenset(f".{suffix.lower().lstrip('.')}" for suffix in given.suffixes)
    return ListingOptions(given.input, given.output, given.state, given.workers, suffixes, storage)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="s3://bucket/folder, or a local folder")
    parser.add_argument("--output", required=True, help="the manifest, a .parquet file, local or in S3")
    parser.add_argument("--state", help="local file from which to go on [beside a local output]")
    parser.add_argument("--workers", type=int, default=16, help="requests at once [16]")
    parser.add_argument(
        "--suffixes", nargs="+", default=sorted(IMAGE_SUFFIXES), help="of the files to list [those of images]"
    )
    parser.add_argument("--s3-endpoint", help="of stores other than Amazon's, http://host:port")
    parser.add_argument("--s3-region", help="of the bucket [from the environment]")
    parser.add_argument("--s3-anonymous", action="store_true", help="for public buckets, without credentials")
    parser.add_argument("--io-attempts", type=int, default=5, help="tries of each request [5]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
