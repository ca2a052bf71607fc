"""VisualTokens -> Caption: the half of the model that speaks.

A row is one image and a prompt about it, or a conversation and all of its images. The projector runs here, on
kept tokens only: features before it are a quarter of the bytes to hand over.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import torch
from torch import Tensor, nn

from hired.engine import GREEDY, Completion, Engine, Event, Request, Sampling
from hired.engine.shared import News, SharedEngine
from hired.errors import ConfigurationError, GenerationError, PromptError
from hired.packing import Layout, Newlines, Positions, interleaved_position_ids, layout, pack
from hired.prompts import Conversation, PromptTemplate
from hired.types import Caption, VisualTokens

# Images that prompts share get numbers of their own, so that none is taken for another.
_IMAGES = itertools.count()

Images: TypeAlias = VisualTokens | Sequence[VisualTokens]
Prompt: TypeAlias = str | Conversation


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of row ``index``, its caption or error when it has ended, or both at once."""

    index: int
    token_id: int | None
    caption: Caption | GenerationError | None


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Row number ``index``: its images, the token ids around them, and how to answer."""

    index: int
    images: tuple[VisualTokens, ...]
    prompt: tuple[tuple[int, ...], ...]
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
        for index, (prompt, limit) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            row = self._row(index, tokens, prompt, limit, (), GREEDY)
            yield self._request(row, [visual], [places], (*row.prompt[0], *[name] * len(places)))

    def text(self, completion: Completion) -> str:
        """What an engine's answer says."""
        return self._prompts.decode(completion.token_ids).strip()

    def generate(
        self,
        tokens: Sequence[Images],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[Caption | GenerationError]:
        """One caption a row, or the error that this row alone met.

        ``max_new_tokens``, ``stop`` and ``sampling`` are one for all rows or one a row. An answer ends before
        the first of its ``stop`` strings; its ``token_ids`` leave out only the closing end-of-sequence token.
        """
        pieces = self.stream(tokens, prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        captions = {piece.index: piece.caption for piece in pieces if piece.caption is not None}
        return [captions[index] for index in range(len(tokens))]

    def stream(
        self,
        tokens: Sequence[Images],
        prompts: Sequence[Prompt],
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
        self, rows: Iterable[tuple[Images, Prompt, int, tuple[str, ...], Sampling]]
    ) -> Iterator[Piece]:
        accepted: list[_Row] = []
        for index, (images, prompt, limit, stop, sampling) in enumerate(rows):
            try:
                accepted.append(self._row(index, images, prompt, limit, stop, sampling))
            except GenerationError as error:
                yield Piece(index, None, error)
        layouts: dict[int, list[Layout]] = {}
        for event in self._engine.stream(self._requests(accepted, layouts)):
            yield self._piece(accepted[event.index], event, layouts)

    def listen(
        self,
        images: Images,
        prompt: Prompt,
        tell: Callable[[Piece | Exception | None], None],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
    ) -> Callable[[], None]:
        """Begins one answer and returns at once; ``tell`` gets its pieces in the engine's own thread.

        The last thing told is None, or the error that ended the answer. Returns what cancels it: the sequence
        leaves the batch at the next step. Raises GenerationError for a prompt that cannot be written, and
        ConfigurationError for an engine that serves one caller at a time.
        """
        if not isinstance(self._engine, SharedEngine):
            raise ConfigurationError(
                "this engine serves one caller at a time; an endpoint needs 'continuous' or 'vllm'"
            )
        row = self._row(0, images, prompt, max_new_tokens, tuple(stop), sampling)
        layouts: dict[int, list[Layout]] = {}

        def hear(news: News) -> None:
            if isinstance(news, list):
                for event in news:
                    tell(self._piece(row, event, layouts))
            else:
                tell(news)

        return self._engine.listen(self._requests([row], layouts), hear)

    def _row(
        self,
        index: int,
        images: Images,
        prompt: Prompt,
        max_new_tokens: int,
        stop: tuple[str, ...],
        sampling: Sampling,
    ) -> _Row:
        """Raises GenerationError for a prompt that cannot be written, or is about other images."""
        images = (images,) if isinstance(images, VisualTokens) else tuple(images)
        ids = self._prompts.split(prompt) if isinstance(prompt, str) else self._prompts.pieces(prompt)
        if len(ids) != len(images) + 1:
            raise PromptError(f"the prompt is about {len(ids) - 1} images, and {len(images)} were given")
        return _Row(index, images, ids, max_new_tokens, stop, sampling)

    def _piece(self, row: _Row, event: Event, layouts: dict[int, list[Layout]]) -> Piece:
        outcome = event.outcome
        if isinstance(outcome, Completion):
            return Piece(row.index, event.token_id, self._caption(row, layouts.pop(row.index), outcome))
        return Piece(row.index, event.token_id, outcome)

    def _requests(self, rows: Sequence[_Row], layouts: dict[int, list[Layout]]) -> Iterator[Request]:
        """The rows as the engine takes them, one by one; ``layouts`` gets those of each one's images."""
        for row in rows:
            places = layouts[row.index] = [self.layout(image) for image in row.images]
            visual = [self._visual(image, own) for image, own in zip(row.images, places, strict=True)]
            shared = row.prompt[0] if row.images else ()
            yield self._request(row, visual, places, shared)

    @torch.inference_mode()
    def _request(
        self, row: _Row, visual: Sequence[Tensor], places: Sequence[Layout], shared: tuple[int, ...]
    ) -> Request:
        first, *others = row.prompt
        parts = [self._embed(first)]
        for image, text in zip(visual, others, strict=True):
            parts += [image, self._embed(text)]
        return Request(
            torch.cat(parts),
            interleaved_position_ids([len(ids) for ids in row.prompt], places, self._positions),
            row.max_new_tokens,
            row.stop,
            row.sampling,
            shared_prefix=shared,
        )

    @torch.inference_mode()
    def _visual(self, image: VisualTokens, places: Layout) -> Tensor:
        """An image's embeddings ``[m, d]``, in order and with its newlines."""
        features = self._projector(image.features.to(self._image_newline, non_blocking=True))
        source = Layout(places.source.to(features.device, non_blocking=True), places.slots, places.num_full)
        return pack(source, features, self._image_newline)

    def _embed(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._image_newline.device)
        embeddings: Tensor = self._embed_tokens(ids)
        return embeddings

    def _caption(self, row: _Row, places: Sequence[Layout], completion: Completion) -> Caption:
        text = self._prompts.decode(completion.token_ids)
        for stop in row.stop:
            text = text.partition(stop)[0]
        num_kept = sum(map(len, places))
        return Caption(
            text=text.strip(),
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=sum(map(len, row.prompt)) + num_kept,
            visual_tokens_full=sum(own.num_full for own in places),
            visual_tokens_kept=num_kept,
        )


def _check_packing(newlines: str, positions: str) -> None:
    for option, value, known in (("newlines", newlines, Newlines), ("positions", positions, Positions)):
        if value not in get_args(known):
            raise ConfigurationError(f"{option} is {value!r}, use one of {', '.join(get_args(known))}")
