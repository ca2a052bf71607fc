"""VisualTokens -> Caption: the half of the model that speaks.

The projector runs here, on kept tokens only: features before it are a quarter of the bytes to hand over.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from hired.engine import GREEDY, Completion, Engine, Request, Sampling
from hired.errors import ConfigurationError, GenerationError
from hired.packing import Layout, Newlines, Positions, layout, pack, position_ids
from hired.prompts import Halves, PromptTemplate
from hired.types import Caption, VisualTokens

# Images that prompts share get numbers of their own, so that none is taken for another.
_IMAGES = itertools.count()


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of row ``index``, its caption or error when it has ended, or both at once."""

    index: int
    token_id: int | None
    caption: Caption | GenerationError | None


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Image number ``index``, the token ids before and after it, and how to answer."""

    index: int
    tokens: VisualTokens
    prompt: Halves
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


class Generator:
    """Answers prompts about images from their visual tokens.

    ``projector`` maps features ``[n, d_vision]`` into the language model's width, ``embed_tokens`` its token
    ids, and ``image_newline`` ``[d]`` closes canvas rows; all are on one device and of one dtype.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: PromptTemplate,
        *,
        projector: nn.Module,
        embed_tokens: nn.Module,
        image_newline: Tensor,
        patches_per_side: int,
        newlines: Newlines = "rows",
        positions: Positions = "original",
    ) -> None:
        _check_packing(newlines, positions)
        self._engine = engine
        self._prompts = prompts
        self._projector = projector
        self._embed_tokens = embed_tokens
        self._image_newline = image_newline
        self._patches_per_side = patches_per_side
        self._newlines = newlines
        self._positions = positions

    @property
    def engine(self) -> Engine:
        """What continues the prompts."""
        return self._engine

    @property
    def prompts(self) -> PromptTemplate:
        """What renders prompts, and turns answers into token ids and back."""
        return self._prompts

    def packing(self, newlines: Newlines, positions: Positions) -> Generator:
        """The same model and engine, laying visual tokens out in another way."""
        _check_packing(newlines, positions)
        other = copy.copy(self)
        other._newlines, other._positions = newlines, positions
        return other

    def layout(self, tokens: VisualTokens) -> Layout:
        """Where an image's tokens go."""
        return layout(tokens, self._patches_per_side, newlines=self._newlines)

    def request(self, tokens: VisualTokens, prompt: str, *, max_new_tokens: int = 1) -> Request:
        """One prompt as the engine is given it, for whoever measures the language model itself.

        Raises GenerationError for a prompt that holds image tokens of its own.
        """
        return next(self.requests(tokens, [prompt], max_new_tokens=[max_new_tokens]))

    def requests(
        self, tokens: VisualTokens, prompts: Sequence[str], *, max_new_tokens: Sequence[int]
    ) -> Iterator[Request]:
        """Several prompts about one image, greedy, as the engine takes them.

        The image belongs to what they share, so that an engine that is past it in one of them need not
        compute it again for the others. Raises GenerationError for a prompt that cannot be asked.
        """
        places = self.layout(tokens)
        visual = self._visual(tokens, places)
        name = -1 - next(_IMAGES)
        for prompt, limit in zip(prompts, max_new_tokens, strict=True):
            halves = self._prompts.split(prompt)
            shared = (*halves[0], *[name] * len(places))
            yield self._request(halves, visual, places, limit, (), GREEDY, shared)

    def text(self, completion: Completion) -> str:
        """What an engine's answer says."""
        return self._prompts.decode(completion.token_ids).strip()

    def generate(
        self,
        tokens: Sequence[VisualTokens],
        prompts: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[Caption | GenerationError]:
        """One caption an image, or the error that this row alone met.

        ``max_new_tokens``, ``stop`` and ``sampling`` are one for all rows or one a row. An answer ends before
        the first of its ``stop`` strings; its ``token_ids`` leave out only the closing end-of-sequence token.
        """
        pieces = self.stream(tokens, prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        captions = {piece.index: piece.caption for piece in pieces if piece.caption is not None}
        return [captions[index] for index in range(len(tokens))]

    def stream(
        self,
        tokens: Sequence[VisualTokens],
        prompts: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> Iterator[Piece]:
        """The same token by token; the pieces of several rows mix. Closing it cancels what is not told yet.

        Each image is projected when the engine has room for it.
        """
        count = len(tokens)
        limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
        samplings = [sampling] * count if isinstance(sampling, Sampling) else sampling
        texts = tuple(text for text in stop if isinstance(text, str))
        stops = [texts] * count if len(texts) == len(stop) else [tuple(each) for each in stop]
        if not count == len(prompts) == len(limits) == len(stops) == len(samplings):
            raise ConfigurationError(
                f"one prompt, limit, list of stops and sampling an image: got {count} images, {len(prompts)} "
                f"prompts, {len(limits)} limits, {len(stops)} lists of stops, {len(samplings)} samplings"
            )
        return self._pieces(zip(tokens, prompts, limits, stops, samplings, strict=True))

    def _pieces(
        self, rows: Iterable[tuple[VisualTokens, str, int, tuple[str, ...], Sampling]]
    ) -> Iterator[Piece]:
        accepted: list[_Row] = []
        for index, (image, prompt, limit, stop, sampling) in enumerate(rows):
            try:
                accepted.append(_Row(index, image, self._prompts.split(prompt), limit, stop, sampling))
            except GenerationError as error:
                yield Piece(index, None, error)
        layouts: dict[int, Layout] = {}
        for event in self._engine.stream(self._requests(accepted, layouts)):
            row, outcome = accepted[event.index], event.outcome
            yield Piece(
                row.index,
                event.token_id,
                self._caption(row, layouts.pop(row.index), outcome)
                if isinstance(outcome, Completion)
                else outcome,
            )

    def _requests(self, rows: Sequence[_Row], layouts: dict[int, Layout]) -> Iterator[Request]:
        """The rows as the engine takes them, one by one; ``layouts`` gets each one's layout."""
        for row in rows:
            places = layouts[row.index] = self.layout(row.tokens)
            visual = self._visual(row.tokens, places)
            prefix, _ = row.prompt
            yield self._request(
                row.prompt, visual, places, row.max_new_tokens, row.stop, row.sampling, shared=prefix
            )

    @torch.inference_mode()
    def _visual(self, tokens: VisualTokens, places: Layout) -> Tensor:
        """The visual embeddings ``[m, d]``."""
        features = self._projector(tokens.features.to(self._image_newline, non_blocking=True))
        source = Layout(places.source.to(features.device, non_blocking=True), places.slots, places.num_full)
        return pack(source, features, self._image_newline)

    @torch.inference_mode()
    def _request(
        self,
        prompt: Halves,
        visual: Tensor,
        places: Layout,
        max_new_tokens: int,
        stop: tuple[str, ...],
        sampling: Sampling,
        shared: tuple[int, ...],
    ) -> Request:
        prefix, suffix = prompt
        return Request(
            torch.cat([self._embed(prefix), visual, self._embed(suffix)]),
            position_ids(len(prefix), places, len(suffix), self._positions),
            max_new_tokens,
            stop,
            sampling,
            shared_prefix=shared,
        )

    def _embed(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._image_newline.device)
        embeddings: Tensor = self._embed_tokens(ids)
        return embeddings

    def _caption(self, row: _Row, places: Layout, completion: Completion) -> Caption:
        text = self._prompts.decode(completion.token_ids)
        for stop in row.stop:
            text = text.partition(stop)[0]
        prefix, suffix = row.prompt
        return Caption(
            text=text.strip(),
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prefix) + len(places) + len(suffix),
            visual_tokens_full=places.num_full,
            visual_tokens_kept=len(places),
        )


def _check_packing(newlines: str, positions: str) -> None:
    for option, value, known in (("newlines", newlines, Newlines), ("positions", positions, Positions)):
        if value not in get_args(known):
            raise ConfigurationError(f"{option} is {value!r}, use one of {', '.join(get_args(known))}")
