"""What the endpoint serves and within which limits: flags of ``jobs/serve.py``, ``args`` in ``serve.yaml``.

``python -m pipeline.serve.options`` prints the documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hired import policies
from hired.budget import Budget
from hired.errors import ConfigurationError
from pipeline.config import Config, EncodePool, Engine, GeneratePool, Names, PartitionPool, TokenBudget
from pipeline.flags import Tree

Detail = Literal["auto", "low", "high"]


class Replicas(Tree):
    """The processes of one stage. What is None is decided from the machine when the endpoint starts."""

    min_replicas: int = Field(1, gt=0, description="processes to start with")
    max_replicas: int = Field(1, gt=0, description="processes at most, added as requests pile up")
    target_requests: float = Field(
        8, gt=0, description="requests a process should have in hand; more than that add one"
    )
    num_cpus: float | None = Field(None, ge=0, description="CPUs that Ray sets aside for a process")
    num_gpus: float | None = Field(None, ge=0, description="GPUs for a process, fractions allowed")
    threads: int | None = Field(None, gt=0, description="torch and OpenMP threads of a process")

    @model_validator(mode="after")
    def _min_below_max(self) -> Replicas:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class GenerateReplicas(Replicas):
    """Processes that write answers: each runs as many together as its memory holds."""

    target_requests: float = Field(
        32, gt=0, description="requests a process should have in hand; more than that add one"
    )
    parts_per_s: float = Field(
        150, gt=0, description="texts a second for all streams together, each of one token or of several"
    )


class Limits(Tree):
    """What one request, and all of them together, may ask for."""

    body_bytes: int = Field(32 * 2**20, gt=0, description="bytes of a request")
    image_bytes: int = Field(20 * 2**20, gt=0, description="bytes of one image, after decoding base64")
    images: int = Field(8, gt=0, description="images of one request")
    messages: int = Field(64, gt=0, description="messages of one request")
    prompt_chars: int = Field(32_768, gt=0, description="characters of all texts of one request")
    max_tokens: int = Field(1024, gt=0, description="tokens that an answer may be allowed")
    request_s: float = Field(120.0, gt=0, description="seconds from the first byte to the last")
    in_flight: int = Field(128, gt=0, description="requests at work at once; more are told to come back")
    requests_per_minute: int = Field(
        0, ge=0, description="of one key, or of one address without keys; 0 for any"
    )
    retry_after_s: int = Field(1, gt=0, description="seconds that whoever is sent away is asked to wait")


class Settings(Tree):
    """Everything about the endpoint but its keys."""

    model: str = Field("embedded", min_length=1, description="'embedded', a checkpoint's folder, or a hub id")
    served_name: str | None = Field(
        None, description="what requests call the model; its last part if not given"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the models run; auto takes GPUs if there are any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the models; float32 also hands features over as float32"
    )

    policy: str = Field("hired", description="which visual tokens to keep, unless a request says else")
    policies: Names = Field(
        (), description="policies that requests may name; all that are known if not given"
    )
    token_budget: TokenBudget = Field(
        0.2, description="visual tokens an image may keep (detail auto): a rate (0.2) or a number (576)"
    )
    low_token_budget: TokenBudget = Field(0.05, description="the same for detail low")
    high_token_budget: TokenBudget = Field(0.5, description="the same for detail high")
    max_token_budget: TokenBudget = Field(1.0, description="the most that a request may ask for itself")
    alpha: float = Field(0.5, ge=0, le=1, description="the full-image's share, unless a request says else")
    newlines: Literal["rows", "all", "none"] = Field(
        "rows", description="newline embeddings after canvas rows that keep a token, after all, after none"
    )
    positions: Literal["original", "compact"] = Field(
        "original", description="position ids of kept tokens: as in the full sequence, or closed up"
    )
    default_max_tokens: int = Field(256, gt=0, description="tokens of an answer whose request says nothing")

    max_pixels: int = Field(75_000_000, gt=0, description="of one image; larger ones are not decoded")
    reduced_decoding: bool = Field(False, description="decode big images at a smaller scale")
    image_timeout_s: float = Field(20.0, gt=0, description="seconds that decoding one image may take")
    https_hosts: Names = Field(
        (), description="hosts that https images may come from; without any, images come as data: URIs only"
    )
    fetch_timeout_s: float = Field(10.0, gt=0, description="seconds that one https image may take")

    ingress: Replicas = Field(Replicas(target_requests=64), description="take requests and answer them")
    partition: Replicas = Field(Replicas(), description="decode images and cut them up, on CPUs")
    encode: Replicas = Field(Replicas(), description="turn partitions into visual tokens")
    generate: GenerateReplicas = Field(GenerateReplicas(), description="write the answers")
    engine: Engine = Field(Engine(), description="continues the prompts")
    limits: Limits = Field(Limits(), description="what requests may ask for")

    playground: bool = Field(True, description="serve the page at / that shows what is dropped")
    cors_origins: Names = Field((), description="web pages of other hosts that may call: [https://a.example]")
    api_key_file: Path | None = Field(None, description="file of keys, one a line; beside HIRED_API_KEY")
    without_keys: bool = Field(False, description="serve everybody, on whatever address")

    @model_validator(mode="after")
    def _budgets_within_limits(self) -> Settings:
        for name in ("token_budget", "low_token_budget", "high_token_budget"):
            if exceeds(getattr(self, name), self.max_token_budget):
                raise ValueError(
                    f"{name} {getattr(self, name)} is above max_token_budget {self.max_token_budget}"
                )
        if self.default_max_tokens > self.limits.max_tokens:
            raise ValueError(
                f"default_max_tokens {self.default_max_tokens} is above limits.max_tokens, "
                f"{self.limits.max_tokens}"
            )
        return self

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.served_name or Path(self.model).name

    @property
    def allowed_policies(self) -> tuple[str, ...]:
        """The policies that requests may name."""
        return tuple(dict.fromkeys((self.policy, *(self.policies or policies.names()))))

    def budget(
        self, detail: Detail = "auto", token_budget: int | float | None = None, alpha: float | None = None
    ) -> Budget:
        """For an image of this detail, unless the request gives a budget of its own.

        Raises ConfigurationError for one above the server's.
        """
        own = {"auto": self.token_budget, "low": self.low_token_budget, "high": self.high_token_budget}[
            detail
        ]
        amount = own if token_budget is None else token_budget
        if exceeds(amount, self.max_token_budget):
            raise ConfigurationError(
                f"this server keeps at most {self.max_token_budget} of an image's tokens"
            )
        share = self.alpha if alpha is None else alpha
        if isinstance(amount, float):
            return Budget(rate=amount, alpha=share)
        return Budget(tokens=amount, alpha=share)

    def config(self) -> Config:
        """The same for the stages of the batch job."""
        return Config(
            input="requests",
            output="answers",
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            policy=self.policy,
            token_budget=self.token_budget,
            alpha=self.alpha,
            newlines=self.newlines,
            positions=self.positions,
            max_pixels=self.max_pixels,
            reduced_decoding=self.reduced_decoding,
            image_timeout_s=self.image_timeout_s,
            partition=PartitionPool(threads=self.partition.threads),
            encode=EncodePool(threads=self.encode.threads, num_gpus=self.encode.num_gpus),
            generate=GeneratePool(threads=self.generate.threads, num_gpus=self.generate.num_gpus),
            engine=self.engine,
        )


def exceeds(budget: int | float, most: int | float) -> bool:
    """Whether a budget is above the limit, or may be: a rate is not a number, but all is 1.0."""
    if type(budget) is type(most):
        return budget > most
    return most != 1.0
