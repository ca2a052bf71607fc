"""VisualTokens -> Caption: the half of the model that speaks.

The projector runs here, on kept tokens only: features before it are a quarter of the bytes to hand over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from hired.engine import Completion, Engine, Request
from hired.errors import ConfigurationError, GenerationError
from hired.packing import Layout, Newlines, Positions, layout, pack, position_ids
from hired.prompts import PromptTemplate
from hired.types import Caption, VisualTokens


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    request: Request
    layout: Layout


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
        for option, value, known in (("newlines", newlines, Newlines), ("positions", positions, Positions)):
            if value not in get_args(known):
                raise ConfigurationError(f"{option} is {value!r}, use one of {', '.join(get_args(known))}")
        self._engine = engine
        self._prompts = prompts
        self._projector = projector
        self._embed_tokens = embed_tokens
        self._image_newline = image_newline
        self._patches_per_side = patches_per_side
        self._newlines = newlines
        self._positions = positions

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[VisualTokens],
        prompts: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Sequence[str] = (),
    ) -> list[Caption | GenerationError]:
        """One caption an image, or the error that this row alone met.

        ``max_new_tokens`` is one limit for all rows or one a row. An answer ends before the first of the
        ``stop`` strings; its ``token_ids`` leave out only the closing end-of-sequence token.
        """
        limits = [max_new_tokens] * len(tokens) if isinstance(max_new_tokens, int) else max_new_tokens
        if not len(tokens) == len(prompts) == len(limits):
            raise ConfigurationError(
                f"one prompt and one limit an image: got {len(tokens)} images, {len(prompts)} prompts, "
                f"{len(limits)} limits"
            )
        if not tokens:
            return []
        rows = [
            self._prompt(*row, tuple(stop))
            for row in zip(tokens, self._project(tokens), prompts, limits, strict=True)
        ]
        completions = iter(self._engine.generate([row.request for row in rows if isinstance(row, _Prompt)]))
        return [self._caption(row, next(completions)) if isinstance(row, _Prompt) else row for row in rows]

    def _project(self, tokens: Sequence[VisualTokens]) -> tuple[Tensor, ...]:
        """Each image's features in the language model's width, projected in one go."""
        features = torch.cat([image.features for image in tokens]).to(self._image_newline)
        return torch.split(self._projector(features), [len(image) for image in tokens])

    def _prompt(
        self, tokens: VisualTokens, features: Tensor, prompt: str, max_new_tokens: int, stop: tuple[str, ...]
    ) -> _Prompt | GenerationError:
        try:
            prefix, suffix = self._prompts.split(prompt)
        except GenerationError as error:
            return error
        places = layout(tokens, self._patches_per_side, newlines=self._newlines)
        embeddings = [self._embed(prefix), pack(places, features, self._image_newline), self._embed(suffix)]
        positions = position_ids(len(prefix), places, len(suffix), self._positions).to(features.device)
        return _Prompt(Request(torch.cat(embeddings), positions, max_new_tokens, stop), places)

    def _embed(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._image_newline.device)
        embeddings: Tensor = self._embed_tokens(ids)
        return embeddings

    def _caption(
        self, prompt: _Prompt, completion: Completion | GenerationError
    ) -> Caption | GenerationError:
        if isinstance(completion, GenerationError):
            return completion
        text = self._prompts.decode(completion.token_ids)
        for stop in prompt.request.stop:
            text = text.partition(stop)[0]
        return Caption(
            text=text.strip(),
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prompt.request),
            visual_tokens_full=prompt.layout.num_full,
            visual_tokens_kept=len(prompt.layout),
        )
