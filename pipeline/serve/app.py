"""The HTTP application: OpenAI's chat completions over a ``Backend``, behind a gate."""

from __future__ import annotations

from fastapi import FastAPI

from pipeline.serve.backend import Backend
from pipeline.serve.settings import Settings


def create_app(settings: Settings, backend: Backend) -> FastAPI:
    """The application; ``backend`` does the work."""
    app = FastAPI(title="hired", docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        await backend.health()
        return {"status": "ok"}

    if settings.playground:
        from pipeline.serve import playground

        app.include_router(playground.router(backend, settings))
    return app
