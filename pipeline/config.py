"""One typed tree of options: the source of the flags, the YAML file, the manifest and the documentation.

``python -m pipeline.config`` prints the documentation. Flags are the fields' names with dashes, and dots
between levels: ``--max-new-tokens 32``, ``--encode.batch-size 4``. Flags override ``--config run.yaml``,
which overrides the defaults below.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from hired.budget import Budget
from hired.engine import EngineName, EngineOptions, Quantisation
from hired.errors import ConfigurationError
from pipeline.fetching import FetchOptions
from pipeline.flags import Parser, Tree, add_flag, flag, leaves, meaning, put, read_yaml
from pipeline.questions import Question, Questionnaire, read_prompts
from pipeline.reading import ReadOptions
from pipeline.storage import StorageOptions


def _rate_or_tokens(value: Any) -> int | float:
    """A number as it was written: with a decimal point it is a rate, without one a count of tokens."""
    number = _number(value) if isinstance(value, str) else value
    if type(number) is float and 0 < number <= 1:
        return number
    if type(number) is int and number > 1:
        return number
    if type(number) is int and number == 1:
        raise ValueError("1 could mean all tokens or one token; write 1.0 to keep all, or a number from 2 on")
    raise ValueError("write a rate above 0.0 and up to 1.0, such as 0.2, or a number of tokens, such as 576")


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return None


def _mapping(value: Any) -> Any:
    """A mapping as a flag writes it: {tensor_parallel_size: 2}."""
    return _yaml(value) if isinstance(value, str) else value


def _texts(value: Any) -> Any:
    """One text, or several in brackets, as a flag writes them."""
    if not isinstance(value, str):
        return value
    return _yaml(value) if value.startswith("[") else (value,)


def _names(value: Any) -> Any:
    """Names in brackets, or with commas between them, as a flag writes them."""
    if isinstance(value, str) and not value.startswith("["):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return _texts(value)


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not YAML") from error


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Format = Literal["webdataset", "jsonl", "coco", "txt"]
TokenBudget = Annotated[int | float, BeforeValidator(_rate_or_tokens)]


class Pool(Tree):
    """The workers of one stage. What is None is decided from the cluster's size when the job starts."""

    batch_size: int | None = Field(8, gt=0, description="rows a call")
    min_actors: int = Field(1, gt=0, description="workers to start with")
    max_actors: int | None = Field(None, gt=0, description="workers at most; as many as fit if not given")
    num_cpus: float | None = Field(
        None, gt=0, description="CPUs that Ray sets aside for a worker, fractions allowed"
    )
    num_gpus: float | None = Field(None, ge=0, description="GPUs for a worker, fractions allowed")
    threads: int | None = Field(None, gt=0, description="torch and OpenMP threads of a worker")

    @model_validator(mode="after")
    def _min_below_max(self) -> Pool:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


class PartitionPool(Pool):
    """Workers that decode images: small batches, since one image may take a gigabyte while it is decoded."""

    batch_size: int | None = Field(2, gt=0, description="rows a call")


class EncodePool(Pool):
    """Workers that see: their batches are bounded by patches, whatever the images' grids."""

    max_patches: int | None = Field(
        None, gt=0, description="patches that go through the tower together; 18,432 on GPUs, 2,880 elsewhere"
    )
    compile: bool = Field(False, description="compile the tower's layers, which takes minutes at the start")


class GeneratePool(Pool):
    """Workers that write captions: many rows a call, of which the engine runs as many as memory holds."""

    batch_size: int | None = Field(None, gt=0, description="rows a call; 256 on GPUs, 32 elsewhere")
    concurrent_calls: int = Field(
        2, gt=0, description="calls at once in a worker: the next one's rows fill the gaps of the one before"
    )


class Engine(Tree):
    """What continues the prompts, and the memory it may take."""

    name: EngineName = Field("auto", description="the generation engine")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="key-value cache of a worker, in GiB; what its share of memory leaves free"
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="of the memory of a worker's share of its GPU, what it may use"
    )
    max_sequences: int | None = Field(
        None, gt=0, description="sequences decoded together at most; as many as the cache holds if not given"
    )
    prefill_tokens: int | None = Field(None, gt=0, description="prompt tokens that one pass computes")
    quantisation: Quantisation = Field("none", description="bits of the language model's weights")
    vllm: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(
        {}, description="arguments of vllm.LLM, as they are: {tensor_parallel_size: 2}"
    )

    def options(self, num_gpus: float) -> EngineOptions:
        """For a worker that holds so much of a GPU."""
        return EngineOptions(
            name=self.name,
            kv_cache_bytes=None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
            memory_fraction=self.memory_fraction * min(1.0, num_gpus or 1.0),
            max_sequences=self.max_sequences,
            prefill_tokens=self.prefill_tokens,
            quantisation=self.quantisation,
            vllm=self.vllm,
        )


class Config(Tree):
    """What a captioning job does; every field is a flag and a YAML key."""

    input: str = Field(
        min_length=1,
        description="folder, glob, file or s3:// prefix: images, parquet, WebDataset tars, JSONL, a manifest",
    )
    image_column: str | None = Field(
        None, description="the image column of parquet input; found if there is only one"
    )
    uri_column: str | None = Field(
        None,
        description="the column of parquet or JSONL input that says where images lie; found if not given",
    )
    key_column: str | None = Field(None, description="the column that names rows; 'key' if there is one")
    key: Literal["path", "sha256"] = Field(
        "path", description="what names a row that has no key of its own; sha256 reads every image once more"
    )
    dedup: Literal["none", "sha256"] = Field(
        "none", description="drop images whose bytes came before; reads every image once more"
    )
    keep_columns: Names = Field((), description="columns of the input to keep in the output: [url, license]")
    limit: int | None = Field(None, gt=0, description="take only the first rows")
    sample: int | None = Field(None, gt=0, description="take only so many rows, drawn evenly by the seed")
    max_file_bytes: int = Field(
        128 * 1024**2, gt=0, description="larger files become dead letters before they are read"
    )
    http_hosts: Names = Field(
        (), description="hosts that http(s) images may come from; any public one if not given"
    )
    http_timeout_s: float = Field(30.0, gt=0, description="seconds that one http(s) image may take")
    s3_endpoint: str | None = Field(None, description="URL of an S3 service other than Amazon's")
    s3_region: str | None = Field(None, description="region of the buckets")
    s3_anonymous: bool = Field(False, description="send no credentials to S3")
    io_attempts: int = Field(6, gt=0, description="how often a read or write over the network is tried")

    output: str = Field(
        min_length=1,
        description="folder or s3:// prefix of the run; naming that of an unfinished run goes on with it",
    )
    formats: Annotated[tuple[Format, ...], BeforeValidator(_names)] = Field(
        (), description="formats besides parquet: webdataset, jsonl, coco, txt"
    )
    keep_images: bool = Field(False, description="put the images themselves into the parquet files")
    rows_per_file: int = Field(5000, gt=0, description="rows of an output file")
    rows_per_unit: int = Field(
        100, gt=0, description="rows that are committed together, and lost together when a run is killed"
    )
    retry_failed: bool = Field(
        False, description="try the dead letters of a finished run again that may succeed another time"
    )

    model: str = Field("embedded", description="'embedded', a checkpoint's folder, or a hub id")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the models run; auto takes GPUs if the cluster has any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the models; float32 also hands features over as float32"
    )

    policy: str = Field(
        "hired",
        description="which visual tokens to keep: hired, hired-reference, keep-all, or a registered one",
    )
    token_budget: TokenBudget = Field(
        0.2, description="visual tokens an image may keep: a rate (0.2, 1.0 keeps all) or a number (576)"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="the full-image's share of the budget")
    newlines: Literal["rows", "all", "none"] = Field(
        "rows", description="newline embeddings after canvas rows that keep a token, after all, after none"
    )
    positions: Literal["original", "compact"] = Field(
        "original", description="position ids of kept tokens: as in the full sequence, or closed up"
    )

    prompt: str = Field(
        "Describe the image.",
        min_length=1,
        description="what to ask about each image, or @FILE; {name} is the row's column of that name",
    )
    prompts: Path | None = Field(
        None, description="YAML file of several prompts, id: prompt, all asked of each image"
    )
    row_parameters: Names = Field(
        (),
        description="columns that set a row's own max_new_tokens, temperature, top_p, seed or stop",
    )
    max_new_tokens: int = Field(64, gt=0, description="tokens to generate at most")
    stop: Texts = Field(
        (), description='texts before which an answer ends: one, or a list such as [".", ";"]'
    )
    temperature: float = Field(0.0, ge=0, le=100, description="0 always takes the likeliest token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest tokens that together have this probability"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="with the row's key, decides what is drawn at a temperature above 0"
    )

    # The worst kind, a WebP with transparency, takes 16 bytes a pixel: 1.2 GB, in a worker of 0.5 GB.
    max_pixels: int = Field(
        75_000_000, gt=0, description="larger images become dead letters before they are decoded"
    )
    reduced_decoding: bool = Field(
        False,
        description="decode big images at a smaller scale: up to nine times faster, and a few levels off",
    )
    image_timeout_s: float = Field(
        60.0, gt=0, description="seconds that decoding one image may take; longer ones become dead letters"
    )
    isolated_decoding: bool = Field(
        True, description="decode in a process of its own, so that an image that kills it kills nothing else"
    )

    partition: PartitionPool = Field(PartitionPool(), description="decode images and cut them up, on CPUs")
    encode: EncodePool = Field(EncodePool(), description="turn partitions into visual tokens")
    generate: GeneratePool = Field(GeneratePool(), description="write the captions")
    engine: Engine = Field(Engine(), description="continues the prompts")
    actors: Literal["auto", "fixed"] = Field(
        "auto",
        description="auto sizes the pools by half a minute's measurement, where 5,000 rows or more are to do",
    )
    autoscaling: bool = Field(
        False, description="the cluster grows on demand: do not insist that all workers fit at the start"
    )
    batch_timeout_s: float = Field(
        1800.0, gt=0, description="a worker that takes longer for a batch is ended, and its rows tried again"
    )
    start_timeout_s: float = Field(
        3600.0, gt=0, description="seconds without any progress, as when models load or nodes join"
    )

    plan: bool = Field(
        False, description="measure the stages on a sample, say what the run will take, and end"
    )
    plan_seconds: float = Field(
        60.0, gt=0, description="seconds to measure each stage, and to try the whole pipeline"
    )
    plan_cluster: str | None = Field(None, description="plan for this cluster: '64 CPU, 8 GPU'")
    gpu_hour_price: float | None = Field(
        None, ge=0, description="what a GPU costs an hour, for the plan's sum"
    )
    dry_run: bool = Field(False, description="check everything, count the rows, and end")
    summary: Literal["text", "json"] = Field(
        "text", description="what is printed to stdout at the end; --json is short for --summary json"
    )

    @property
    def pools(self) -> dict[str, Pool]:
        """The workers of each stage, by its name."""
        return {"partition": self.partition, "encode": self.encode, "generate": self.generate}

    @property
    def storage(self) -> StorageOptions:
        """How S3 is reached."""
        return StorageOptions(self.s3_endpoint, self.s3_region, self.s3_anonymous, self.io_attempts)

    @property
    def reading(self) -> ReadOptions:
        """How the bytes of rows are read."""
        http = FetchOptions(
            hosts=self.http_hosts,
            timeout_s=self.http_timeout_s,
            max_bytes=self.max_file_bytes,
            attempts=self.io_attempts,
        )
        return ReadOptions(max_file_bytes=self.max_file_bytes, storage=self.storage, http=http)

    def questionnaire(self) -> Questionnaire:
        """What is asked about every image; raises ConfigurationError for files that cannot be read."""
        question = Question(
            number=0,
            id="default",
            prompt=_text_of(self.prompt),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
        )
        questions = [question] if self.prompts is None else read_prompts(self.prompts, question)
        return Questionnaire(questions, self.row_parameters)

    @property
    def budget(self) -> Budget:
        if isinstance(self.token_budget, float):
            return Budget(rate=self.token_budget, alpha=self.alpha)
        return Budget(tokens=self.token_budget, alpha=self.alpha)


def _text_of(prompt: str) -> str:
    """The prompt, or what the file holds that ``@FILE`` names."""
    if not prompt.startswith("@"):
        return prompt
    try:
        text = Path(prompt[1:]).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--prompt {prompt}: the file cannot be read ({error})") from error
    if not text:
        raise ConfigurationError(f"--prompt {prompt}: the file is empty")
    return text


# Options that may change when a run is resumed: no caption depends on them.
OPERATIONAL = frozenset(
    {"output", "device", "partition", "encode", "generate", "actors", "autoscaling", "retry_failed"}
    | {"batch_timeout_s", "start_timeout_s", "plan", "plan_seconds", "plan_cluster", "gpu_hour_price"}
    | {"dry_run", "summary", "http_timeout_s", "io_attempts", "s3_endpoint", "s3_region", "s3_anonymous"}
    | {"image_timeout_s", "isolated_decoding"}
)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The options, with both values, by which two runs could write different captions."""
    return [
        f"{flag(name)} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted({*before, *after} - OPERATIONAL)
        if before.get(name) != after.get(name)
    ]


# How --help and the documentation arrange the options; each stands in one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "Input": (
        *("input", "image_column", "uri_column", "key_column", "key", "dedup", "keep_columns", "limit"),
        *("sample", "max_file_bytes", "http_hosts", "http_timeout_s", "s3_endpoint", "s3_region"),
        *("s3_anonymous", "io_attempts"),
    ),
    "Output": ("output", "formats", "keep_images", "rows_per_file", "rows_per_unit", "retry_failed"),
    "Model": ("model", "device", "dtype", "engine"),
    "Visual tokens": ("policy", "token_budget", "alpha", "newlines", "positions"),
    "Questions": (
        *("prompt", "prompts", "row_parameters", "max_new_tokens", "stop", "temperature", "top_p", "seed"),
    ),
    "Decoding": ("max_pixels", "reduced_decoding", "image_timeout_s", "isolated_decoding"),
    "Workers": (
        *("partition", "encode", "generate", "actors", "autoscaling", "batch_timeout_s"),
        "start_timeout_s",
    ),
    "Planning and printing": ("plan", "plan_seconds", "plan_cluster", "gpu_hour_price", "dry_run", "summary"),
}


def from_command_line(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that flags, YAML file and defaults give together; raises ConfigurationError."""
    known, unknown = _parser().parse_known_args(arguments)
    if unknown:
        names = ["config", *(name for name, _ in leaves(Config))]
        wrong = unknown[0].split("=")[0]
        raise ConfigurationError(f"unknown argument {wrong}{_nearest(wrong, map(flag, names))}")
    flags = {name: value for name, value in vars(known).items() if value is not None}
    file = flags.pop("config", None)
    tree = read_yaml(Path(file)) if file else {}
    for name, value in flags.items():
        put(tree, name, value, example="batch_size: 8")
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping; raises ConfigurationError that names every wrong key."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigurationError("; ".join(map(_explain, error.errors()))) from error


PAGE = """# Options of `jobs/caption_corpus.py`

Every option is a flag and a key of the YAML file given by `--config`. Flags override the file, the file
overrides the defaults, and an unknown key is an error. `make docs` writes this page, from
`pipeline/config.py`.

A token budget with a decimal point is a rate of the image's tokens, one without is a number of tokens.
`1.0` keeps all tokens; a bare `1` could mean either and is refused.
"""


def reference() -> str:
    """The documentation of every option, a page of Markdown."""
    parts = [PAGE.rstrip()]
    for title, options in _groups():
        rows = [
            f"| `{flag(name)}` | `{name}` | {_default(field)} | {meaning(field)} |".replace("\n", " ")
            for name, field in options
        ]
        parts.append(
            f"## {title}\n\n| flag | YAML key | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def _groups() -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """Each group of options with its leaves."""
    options = list(leaves(Config))
    for title, names in GROUPS.items():
        yield title, [(name, field) for name, field in options if name.partition(".")[0] in names]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Caption a corpus of images. Flags override the YAML file.",
        allow_abbrev=False,
        argument_default=None,
    )
    parser.add_argument("--config", metavar="run.yaml", help="YAML file with the keys of the flags below")
    for title, options in _groups():
        group = parser.add_argument_group(title)
        for name, field in options:
            add_flag(group, name, field, _default(field))
    parser.add_argument(
        "--json", dest="summary", action="store_const", const="json", help="print the summary as JSON"
    )
    return parser


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "auto" if field.default is None else str(field.default)


def _explain(error: Any) -> str:
    """One validation error as a sentence that names the key and, for an unknown one, its nearest match."""
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        names = [known for known, _ in leaves(Config)] + list(Config.model_fields)
        return f"unknown key {name!r}{_nearest(name, names)}"
    if error["type"] == "missing":
        return f"{flag(name)} is required (or the key {name!r} in the YAML file)"
    got = f" (got {error['input']!r})" if isinstance(error["input"], str | int | float) else ""
    return f"{name}: {error['msg'].removeprefix('Value error, ')}{got}"


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists all"


if __name__ == "__main__":
    print(reference())
