"""The page at ``/`` that shows what is dropped, and the two routes of its own.

The page is static and holds no secret, so it is there without a key; what it asks for is not. Answers come
from the same ``/v1/chat/completions`` as everybody's. Pictures are posted again with every look: the last few
partitions are remembered, so that moving the budget costs an encoding and no decoding.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files

import numpy as np
from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from hired import policies
from hired.errors import ConfigurationError
from hired.geometry import real_patches
from hired.packing import Newlines, layout
from hired.types import Partitions, VisualTokens
from pipeline.serve.api_error import invalid
from pipeline.serve.backend import Backend, ModelCard
from pipeline.serve.errors import of_image
from pipeline.serve.images import ImageSource
from pipeline.serve.requests import Body, HiredOptions, ImageUrl
from pipeline.serve.settings import Settings

# What the page is made of: no other file can be asked for.
MEDIA_TYPES = {
    "playground.js": "text/javascript; charset=utf-8",
    "partitions.js": "text/javascript; charset=utf-8",
    "requests.js": "text/javascript; charset=utf-8",
    "playground.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "example.webp": "image/webp",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks again after an update of the endpoint
}
# Partitions of a LLaVA-NeXT image take 1.7 MB.
REMEMBERED = 8
USUAL_RATE = 0.2
EMBEDDED = "This model knows painted scenes only: its words about photographs mean nothing."
QUALITY = 88


class PolicyChoice(BaseModel):
    """A policy that requests may name."""

    name: str
    description: str


class Options(BaseModel):
    """What the page offers. Rates are shares of a picture's tokens; ``most_tokens`` bounds their number."""

    model: str
    note: str
    policies: list[PolicyChoice]
    policy: str
    rate: float
    highest_rate: float
    most_tokens: int | None
    alpha: float
    max_tokens: int
    max_image_bytes: int
    num_layers: int
    feature_layer: int


class GridShape(BaseModel):
    """Rows and columns of sub-images."""

    rows: int
    cols: int


class Counts(BaseModel):
    """How many there are, and how many of them are kept."""

    full: int
    kept: int


class PartitionView(BaseModel):
    """A partition as the model sees it. ``kept`` and ``padding`` are raster indices of patches."""

    picture: str | None = Field(description="data URI of the pixels, if asked for")
    num_real: int
    kept: list[int]
    padding: list[int]


class AttentionView(BaseModel):
    """Attention of CLS in one layer: for each partition and patch 255 sqrt(attention / the largest)."""

    layer: int
    largest: float
    maps: list[list[int]]


class Sight(BaseModel):
    """What remains of a picture. ``tokens`` counts newlines, ``patches`` does not.

    Partitions are the full-image and the sub-images in raster order.
    """

    grid: GridShape
    side: int
    patch_size: int
    patches_per_side: int
    tokens: Counts
    patches: Counts
    partitions: list[PartitionView]
    attention: list[AttentionView]


class LookRequest(Body):
    """A picture as in a chat request's image part, and how much of it to keep."""

    image_url: ImageUrl
    hired: HiredOptions | None = None
    layers: list[int] = Field([], max_length=64, description="layers whose attention to show, counted from 0")
    pictures: bool = Field(True, description="whether to return the partitions' pixels")


def router(backend: Backend, settings: Settings, source: ImageSource | None = None) -> APIRouter:
    """The page's routes; ``backend`` sees what ``source`` reads, within the limits of ``settings``."""
    routes = APIRouter(tags=["playground"])
    looker = Looker(backend, settings, source or ImageSource(settings))

    routes.add_api_route("/", _file("index.html", "text/html; charset=utf-8"), include_in_schema=False)
    for name, media_type in MEDIA_TYPES.items():
        routes.add_api_route(f"/playground/{name}", _file(name, media_type), include_in_schema=False)

    @routes.get("/playground/options")
    async def options() -> Options:
        """What a picture may be asked with."""
        choices = await run_in_threadpool(_choices, settings.allowed_policies)
        return _options(settings, await backend.card(), choices)

    @routes.post("/playground/look")
    async def look(request: LookRequest) -> Sight:
        """Which tokens of a picture remain, and what CLS attends to."""
        async with asyncio.timeout(settings.limits.request_s):
            return await looker.look(request)

    return routes


class Looker:
    """Sees pictures as a chat request would, and tells what it saw."""

    def __init__(self, backend: Backend, settings: Settings, source: ImageSource) -> None:
        self._backend = backend
        self._settings = settings
        self._source = source
        self._recent = RecentPartitions()

    async def look(self, request: LookRequest) -> Sight:
        """Raises ApiError for what is wrong with the request."""
        hired = request.hired or HiredOptions()
        policy = self._settings.policy if hired.policy is None else hired.policy
        if policy not in self._settings.allowed_policies:
            raise invalid(
                f"this server has the policies {', '.join(self._settings.allowed_policies)}", "hired.policy"
            )
        try:
            detail = request.image_url.detail or "auto"
            budget = self._settings.budget(detail, hired.token_budget, hired.alpha)
        except ConfigurationError as error:
            raise invalid(str(error), "hired.token_budget") from error
        card = await self._backend.card()
        if not all(0 <= layer < card.num_layers for layer in request.layers):
            raise invalid(f"this model has the layers 0 to {card.num_layers - 1}", "layers")
        partitions = await self._partitions(request.image_url.url)
        try:
            tokens = await self._backend.encode(partitions, budget, policy)
        except ConfigurationError as error:  # a policy that is made in Python only
            raise invalid(str(error), "hired.policy") from error
        attention = await self._backend.attention(partitions, request.layers) if request.layers else {}
        return await run_in_threadpool(
            sight, partitions, tokens, attention, card, self._settings.newlines, request.pictures
        )

    async def _partitions(self, url: str) -> Partitions:
        try:
            return await self._recent.of(await self._source.read(url), self._backend.partition)
        except Exception as error:
            explained = of_image(error, "image_url")
            if explained is None:
                raise
            raise explained from error


class RecentPartitions:
    """The partitions of the pictures seen last, by what is in their files."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._recent: OrderedDict[bytes, Partitions] = OrderedDict()

    async def of(self, image: bytes, cut: Callable[[bytes], Awaitable[Partitions]]) -> Partitions:
        """The image's partitions, from ``cut`` if they are not remembered."""
        digest = hashlib.sha256(image).digest()
        partitions = self._recent.get(digest) or await cut(image)
        self._recent[digest] = partitions
        self._recent.move_to_end(digest)
        while len(self._recent) > self._most:
            self._recent.popitem(last=False)
        return partitions


@cache
def _static(name: str) -> bytes:
    return files("pipeline.serve").joinpath("static", name).read_bytes()


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(_static(name), media_type=media_type, headers=HEADERS)

    return answer


def _options(settings: Settings, card: ModelCard, choices: list[PolicyChoice]) -> Options:
    most = settings.max_token_budget
    highest_rate = most if isinstance(most, float) else 1.0
    own = settings.token_budget
    return Options(
        model=settings.model_name,
        note=EMBEDDED if settings.model == "embedded" else "",
        policies=choices,
        policy=settings.policy,
        rate=own if isinstance(own, float) else min(USUAL_RATE, highest_rate),
        highest_rate=highest_rate,
        most_tokens=most if isinstance(most, int) else None,
        alpha=settings.alpha,
        max_tokens=settings.limits.max_tokens,
        max_image_bytes=settings.limits.image_bytes,
        num_layers=card.num_layers,
        feature_layer=card.feature_layer,
    )


def _choices(names: Sequence[str]) -> list[PolicyChoice]:
    """The policies of these names that can be had by name, each with the first line of its module."""
    choices = []
    for name in names:
        try:
            policy = policies.get(name)
        except ConfigurationError:  # made in Python only, or broken: requests that name it are told why
            continue
        first_line, *_ = (sys.modules[type(policy).__module__].__doc__ or "").strip().splitlines() or [""]
        choices.append(PolicyChoice(name=name, description=first_line))
    return choices


def sight(
    partitions: Partitions,
    tokens: VisualTokens,
    attention: Mapping[int, NDArray[np.float32]],
    card: ModelCard,
    newlines: Newlines,
    pictures: bool,
) -> Sight:
    """What remains of an image, and the ``attention`` ``[k + 1, patches]`` of the layers in it."""
    patches = card.patches_per_side
    places = layout(tokens, patches, newlines=newlines)
    real = real_patches(partitions.original_size, partitions.grid, patches).numpy()
    kept = np.zeros_like(real)
    kept[tokens.partition.numpy(), tokens.patch.numpy()] = True
    return Sight(
        grid=GridShape(rows=partitions.grid.rows, cols=partitions.grid.cols),
        side=partitions.side,
        patch_size=partitions.side // patches,
        patches_per_side=patches,
        tokens=Counts(full=places.num_full, kept=len(places)),
        patches=Counts(full=tokens.num_before, kept=len(tokens)),
        partitions=[
            PartitionView(
                picture=_data_uri(pixels) if pictures else None,
                num_real=int(own_real.sum()),
                kept=np.flatnonzero(own_kept).tolist(),
                padding=np.flatnonzero(~own_real).tolist(),
            )
            for pixels, own_real, own_kept in zip(partitions.pixels, real, kept, strict=True)
        ],
        attention=[_attention_view(layer, maps, real) for layer, maps in attention.items()],
    )


def _attention_view(layer: int, maps: NDArray[np.float32], real: NDArray[np.bool_]) -> AttentionView:
    """Padding counts as none. Square roots, because a few patches take most of what there is."""
    finite = np.where(real & np.isfinite(maps), maps, 0).clip(min=0)
    largest = float(finite.max())
    shares = np.sqrt(finite / largest) if largest > 0 else finite
    return AttentionView(layer=layer, largest=largest, maps=np.rint(255 * shares).astype(int).tolist())


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
