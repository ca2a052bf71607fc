"""A request on its way through the continuous engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hired.engine import Request
from hired.engine.answer import Answer
from hired.engine.kv_cache import Extent, Segment


class Sequence:
    """What the engine knows of one request.

    ``num_cached`` tokens are in the KV cache or on their way there, ``num_sampled`` were drawn or are being
    drawn; both run ahead of ``answer``, which holds what has come back from the device.
    """

    def __init__(self, handle: int, request: Request, answer: Answer) -> None:
        self.handle, self.request, self.answer = handle, request, answer
        self.embeddings, self.positions = request.embeddings, request.positions
        self.num_prompt = len(request)  # tokens that are given as embeddings
        self.last_position = int(request.positions[-1])
        self.num_cached = 0
        self.num_sampled = 0
        self.extent: Extent | None = None

    @property
    def num_places(self) -> int:
        """Places in the KV cache of the prompt and the longest answer, whose last token needs none."""
        return len(self.request) + self.request.max_new_tokens - 1

    @property
    def is_decoding(self) -> bool:
        return self.num_cached >= self.num_prompt

    @property
    def num_unseen(self) -> int:
        """Tokens of the prompt that are not in the KV cache yet."""
        return max(0, self.num_prompt - self.num_cached)

    @property
    def is_drawn(self) -> bool:
        """Whether all the tokens it may have are drawn or being drawn."""
        return self.num_sampled == self.request.max_new_tokens

    @property
    def next_position(self) -> int:
        """The position of the token that is decoded next."""
        return self.last_position + 1 + self.num_cached - self.num_prompt

    def segment(self, room: int) -> Segment:
        """Its part in the next pass: its last token, or as much of its prompt as there is ``room`` for."""
        assert self.extent is not None
        num_new = 1 if self.is_decoding else min(room, self.num_unseen)
        return Segment(self.extent, self.num_cached, num_new)

    def advance(self, segment: Segment) -> bool:
        """Counts a pass that was launched; True when it draws a token of this sequence."""
        self.num_cached = segment.num_after
        if self.num_cached < self.num_prompt:
            return False
        self.num_sampled += 1
        return True

    def begin_again(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Give up the KV cache: what was answered so far becomes part of the prompt, so nothing is lost."""
        ids = self.answer.token_ids
        if len(self.request) + len(ids) > self.num_prompt:
            answered = embed(torch.tensor(ids, device=self.request.embeddings.device))
            self.embeddings = torch.cat([self.request.embeddings, answered])
            after = int(self.request.positions[-1]) + 1 + torch.arange(len(ids))
            self.positions = torch.cat([self.request.positions, after])
            self.last_position = int(self.positions[-1])
            self.num_prompt = len(self.embeddings)
        self.num_cached, self.num_sampled = 0, len(ids)
