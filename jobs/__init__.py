"""Entry points, run as files: ``python jobs/caption_corpus.py --help``."""
