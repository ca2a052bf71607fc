"""The endpoint in this process: one event loop, one copy of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from pipeline.serve.app import create_app
from pipeline.serve.local import LocalBackend
from pipeline.serve.settings import Settings
from tests.pipeline.serve.servers import Servers

SETTINGS = Settings(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with Servers() as running:
        yield running


@pytest.fixture(scope="session")
def backend() -> LocalBackend:
    return LocalBackend(SETTINGS.config())


@pytest.fixture(scope="session")
def endpoint(servers: Servers, backend: LocalBackend) -> Iterator[httpx.Client]:
    """A client of the endpoint with the embedded model, without keys."""
    with httpx.Client(base_url=servers.add(create_app(SETTINGS, backend)), timeout=120) as client:
        yield client
