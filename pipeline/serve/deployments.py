"""The endpoint as an application of Ray Serve.

    HTTP --> Ingress --> Partition (CPU) --> Encode --> Generate --> stream of text

Each deployment holds a worker of ``pipeline.serve.workers``. The ingress calls them one after the other, but
pixels go from Partition to Encode without it, and so does what Partition says when it fails. Queues are kept
where requests are let in: the ingress admits no more than its limits say, and behind it nothing is refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
import ray
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import ValidationError
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from hired.budget import Budget
from hired.errors import ConfigurationError, HiredError
from hired.types import Caption, Partitions, VisualTokens
from pipeline.config import Config
from pipeline.resources import ENCODE_GPU_SHARE, GENERATE_GPU_SHARE
from pipeline.serve.admission import Admission
from pipeline.serve.app import create_app
from pipeline.serve.backend import EngineLoad, ModelCard, Query, UnavailableError
from pipeline.serve.keys import Keys
from pipeline.serve.settings import Replicas, Settings
from pipeline.serve.workers import EncodeWorker, GenerateWorker, PartitionWorker

# A stage that says it is ill three times is replaced.
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
# Beside the requests that are let in: questions about health and metrics.
SPARE_REQUESTS = 16
# On cores that all stages share generation takes what the others leave. Otherwise it spends them on the few
# answers that it has, each at the price of many, while images wait to join them.
NICENESS = 4
ATTEMPTS = 2
# What is raised where a stage has no process that could answer.
GONE = (
    ray.exceptions.RayActorError,
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

Result = TypeVar("Result")


# A stage's own errors travel as values: raised ones would come as Ray's, and fill the log with tracebacks.
async def _told(work: Awaitable[Result]) -> Result | HiredError:
    try:
        return await work
    except HiredError as error:
        return error


class Partition:
    """Decodes and cuts up."""

    def __init__(self, config: Config) -> None:
        self._worker = PartitionWorker(config)

    async def partition(self, image: bytes) -> Partitions | HiredError:
        return await _told(self._worker.partition(image))

    async def ready(self) -> bool:
        return True


class Encode:
    """Sees."""

    def __init__(self, config: Config) -> None:
        self._worker = EncodeWorker(config)

    async def card(self) -> ModelCard:
        return await self._worker.card()

    async def encode(
        self, partitions: Partitions | HiredError, budget: Budget, policy: str
    ) -> VisualTokens | HiredError:
        if isinstance(partitions, HiredError):
            return partitions
        return await _told(self._worker.encode(partitions, budget, policy))

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None
    ) -> dict[int, NDArray[np.float32]] | HiredError:
        return await _told(self._worker.attention(partitions, layers))

    def check_health(self) -> None:
        """Ray Serve asks; an error three times is a new process."""
        self._worker.check_health()


class Generate:
    """Answers."""

    def __init__(self, config: Config, parts_per_s: float) -> None:
        if config.device == "cpu":
            os.nice(NICENESS)
        self._worker = GenerateWorker(config, parts_per_s)

    async def stream(
        self, query: Query, images: Sequence[VisualTokens], in_parts: bool
    ) -> AsyncGenerator[str | Caption | HiredError, None]:
        async with aclosing(self._worker.stream(query, images, in_parts)) as told:
            try:
                async for said in told:
                    yield said
            except HiredError as error:
                yield error

    async def load(self) -> EngineLoad:
        return self._worker.load()

    def check_health(self) -> None:
        """Ray Serve asks; an error three times is a new process."""
        self._worker.check_health()


class Ingress:
    """Takes the requests."""

    def __init__(self, settings: Settings, keys: Keys, partition: Any, encode: Any, generate: Any) -> None:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("pipeline").setLevel(logging.INFO)
        self._settings, self._keys = settings, keys
        self._backend = ServeBackend(partition, encode, generate)
        self._admission = Admission(settings.limits.in_flight, settings.limits.retry_after_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._settings,
            self._backend,
            self._keys,
            admission=self._admission,
            sends_request_id=False,  # the proxy in front does
        )

    async def drain(self) -> int:
        """Lets nobody in any more; returns how many are still inside."""
        self._admission.close()
        return self._admission.num_inside


class ServeBackend:
    """The stages behind handles of their deployments."""

    def __init__(self, partition: Any, encode: Any, generate: Any) -> None:
        self._partition, self._encode, self._generate = partition, encode, generate
        self._card: ModelCard | None = None

    async def card(self) -> ModelCard:
        self._card = self._card or await _result(self._encode.card.remote())
        return self._card

    async def partition(self, image: bytes) -> Partitions:
        partitions: Partitions = await _result(self._partition.partition.remote(image))
        return partitions

    async def encode(self, partitions: Partitions, budget: Budget, policy: str) -> VisualTokens:
        tokens: VisualTokens = await _result(self._encode.encode.remote(partitions, budget, policy))
        return tokens

    async def see(self, image: bytes, budget: Budget, policy: str) -> VisualTokens:
        partitions = self._partition.partition.remote(image)
        try:
            tokens: VisualTokens = await _result(self._encode.encode.remote(partitions, budget, policy))
        except asyncio.CancelledError:
            partitions.cancel()
            raise
        return tokens

    async def attention(
        self, partitions: Partitions, layers: Sequence[int] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        maps: dict[int, NDArray[np.float32]]
        maps = await _result(self._encode.attention.remote(partitions, layers))
        return maps

    async def stream(
        self, query: Query, images: Sequence[VisualTokens], *, in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        """Asks another worker where one dies before it has said anything."""
        for attempt in range(ATTEMPTS):
            is_silent = True
            response = self._generate.options(stream=True).stream.remote(query, list(images), in_parts)
            try:
                async for said in response:
                    if isinstance(said, HiredError):
                        raise said
                    is_silent = False
                    yield said
                return
            except GONE as error:
                if not is_silent or attempt + 1 == ATTEMPTS:
                    raise _unavailable(error) from error
            finally:
                response.cancel()

    async def health(self) -> None:
        await _result(self._partition.ready.remote())
        await _result(self._encode.card.remote())
        await _result(self._generate.load.remote())

    async def loads(self) -> Sequence[EngineLoad]:
        return [await _result(self._generate.load.remote())]


async def _result(response: Any) -> Any:
    """What a deployment answers; raises HiredError."""
    try:
        result = await response
    except GONE as error:
        raise _unavailable(error) from error
    except asyncio.CancelledError:
        response.cancel()
        raise
    if isinstance(result, HiredError):
        raise result
    return result


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(f"a stage is not there ({type(error).__name__})")


def build(args: dict[str, Any]) -> serve.Application:
    """The application that ``serve.yaml`` names, with ``args`` as its settings and keys from HIRED_API_KEY.

    Raises ConfigurationError for wrong settings, and for none of the keys that a cluster's endpoint needs.
    """
    try:
        settings = Settings.model_validate(args)
    except ValidationError as error:
        raise ConfigurationError(f"wrong settings: {error}") from error
    keys = Keys.read(os.environ, settings.api_key_file)
    if not keys and not settings.without_keys:
        raise ConfigurationError(
            "an endpoint on a cluster needs keys: put them into HIRED_API_KEY or name a file by "
            "api_key_file; without_keys: true serves everybody"
        )
    return application(settings, keys)


def application(settings: Settings, keys: Keys) -> serve.Application:
    """The four deployments, bound together."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    settings = settled(settings, resources.get("CPU", 4), resources.get("GPU", 0))
    config = settings.config()
    return _deployment(serve.ingress()(Ingress), settings.ingress, settings).bind(
        settings,
        keys,
        _deployment(Partition, settings.partition, settings).bind(config),
        _deployment(Encode, settings.encode, settings).bind(config),
        _deployment(Generate, settings.generate, settings).bind(config, settings.generate.parts_per_s),
    )


def settled(settings: Settings, num_cpus: float, num_gpus: float) -> Settings:
    """The settings with every open device and share decided for a cluster of this size.

    One of each stage must fit a machine of two cores; on a GPU, encode and generate share one.
    """
    device = settings.device if settings.device != "auto" else "cuda" if num_gpus else "cpu"
    share = min(1.0, num_cpus / 4)
    gpus = {"encode": ENCODE_GPU_SHARE, "generate": GENERATE_GPU_SHARE} if device == "cuda" else {}
    threads = {"generate": max(1, int(num_cpus) // 2 - 1), "encode": max(1, int(num_cpus) // 8)}
    update: dict[str, Any] = {"device": device}
    for stage in ("ingress", "partition", "encode", "generate"):
        replicas: Replicas = getattr(settings, stage)
        given = {
            "num_cpus": 0.0 if stage == "ingress" else share,
            "num_gpus": gpus.get(stage, 0.0),
            "threads": 1 if device == "cuda" else threads.get(stage, 1),
        }
        update[stage] = replicas.model_copy(
            update={name: value for name, value in given.items() if getattr(replicas, name) is None}
        )
    return settings.model_copy(update=update)


def _deployment(worker: type, replicas: Replicas, settings: Settings) -> Any:
    """One stage as a deployment; what has begun may end before its process does.

    A replica takes all that was let in, and keeps its own queue: Ray Serve's router asks a full one again at
    growing intervals, and leaves it idle in between.
    """
    options: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": replicas.min_replicas,
                "max_replicas": replicas.max_replicas,
                "target_ongoing_requests": replicas.target_requests,
            }
        }
    return serve.deployment(worker).options(
        name=worker.__name__,
        max_ongoing_requests=settings.limits.in_flight * settings.limits.images + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.limits.request_s,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **options,
    )
