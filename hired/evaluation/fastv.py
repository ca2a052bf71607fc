"""FastV, which drops visual tokens inside the language model (Chen et al., ECCV 2024, arXiv 2403.06764).

All tokens go through the first K layers. The attention of the prompt's last token in the K-th, a mean over
heads, ranks the visual tokens; only the best of them take part in the layers above, in prefill and in decode.
They keep their places: text and positions are as if nothing had been dropped. Newlines are visual tokens.

For comparison only. What is dropped stays in the batch as rows that nobody reads, so nothing is faster here;
and even done well FastV prefills K layers with everything, which ``mean_visual_tokens`` accounts for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hired.budget import Budget
from hired.engine.decoder import Decoder
from hired.errors import ConfigurationError
from hired.evaluation.language import attention, decoder_of, gathered, groups, seen
from hired.types import Caption, VisualTokens

if TYPE_CHECKING:
    from hired.engine import Request
    from hired.vlm import VLM

NUM_FULL_LAYERS = 2  # the paper's K


@dataclass(frozen=True, slots=True)
class FastV:
    """One way of answering: ``budget`` of the visual tokens above the first ``num_full_layers``."""

    budget: Budget
    num_full_layers: int = NUM_FULL_LAYERS

    @property
    def name(self) -> str:
        return f"fastv K={self.num_full_layers}"


def generate(
    vlm: VLM,
    tokens: Sequence[VisualTokens],
    prompts: str | Sequence[str],
    budget: Budget,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    num_full_layers: int = NUM_FULL_LAYERS,
) -> list[Caption]:
    """Greedy answers, ended by the tokenizer's end of sequence.

    ``tokens`` are those of the policy keep-all. One prompt and limit for all or one an image. ``budget`` is
    taken of all visual tokens, newlines included; its alpha has no meaning.
    ``visual_tokens_kept`` counts those above the first ``num_full_layers``. Raises ConfigurationError where
    the language model has no layer above them, and what ``language.decoder_of`` raises.
    """
    decoder = decoder_of(vlm)
    if not 0 < num_full_layers < decoder.shape.num_layers:
        raise ConfigurationError(
            f"num_full_layers={num_full_layers} leaves no layer to rank by or none to drop in; of this "
            f"language model's {decoder.shape.num_layers} layers give 1 to {decoder.shape.num_layers - 1}"
        )
    asked = [prompts] * len(tokens) if isinstance(prompts, str) else prompts
    limits = [max_new_tokens] * len(tokens) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [
        vlm.generator.request(image, prompt, max_new_tokens=limit)
        for image, prompt, limit in zip(tokens, asked, limits, strict=True)
    ]
    spans = [_visual(vlm, request, prompt) for request, prompt in zip(requests, asked, strict=True)]
    captions: list[Caption] = []
    for some in groups([len(request) for request in requests]):
        pruned = _Pruned(decoder, spans[some], budget, num_full_layers)
        captions += _decoded(vlm, decoder, requests[some], pruned)
    return captions


def mean_visual_tokens(num_full: float, num_kept: float, num_layers: int, num_full_layers: int) -> float:
    """The visual tokens that a layer saw, a mean over layers: what a prefill of FastV costs.

    ``num_full`` of them in the first ``num_full_layers`` and ``num_kept`` above.
    """
    return (num_full * num_full_layers + num_kept * (num_layers - num_full_layers)) / num_layers


@dataclass(slots=True)
class _Sequence:
    """The visual tokens of one sequence, those of them that remain, and its keys and values by layer."""

    visual: slice
    remaining: Tensor | None = None
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Pruned:
    """``Attend`` of a decoder with a cache that loses visual tokens above the first layers.

    Called first with whole prompts, one after the other, and then with one token of each sequence. A sliding
    window counts the tokens that remain.
    """

    def __init__(
        self, decoder: Decoder, visual: Iterable[slice], budget: Budget, num_full_layers: int
    ) -> None:
        self.sequences = [_Sequence(span) for span in visual]
        self._windows = decoder.shape.windows
        self._budget, self._num_full_layers = budget, num_full_layers
        self.lengths: list[int] = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(
            self.sequences,
            *(torch.split(tensor, self.lengths) for tensor in (queries, keys, values)),
            strict=True,
        )
        return torch.cat([self._one(layer, *part) for part in parts])

    def _one(self, layer: int, sequence: _Sequence, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        window = self._windows[layer]
        if len(sequence.cache) > layer:  # decoding
            before = sequence.cache[layer]
            keys, values = torch.cat([before[0], keys]), torch.cat([before[1], values])
            sequence.cache[layer] = keys, values
            return gathered(queries, keys, values, seen(1, len(keys), window, queries))
        if layer < self._num_full_layers:
            mask = seen(len(queries), len(keys), window, queries)
            if layer == self._num_full_layers - 1:
                sequence.remaining = self._ranked(
                    attention(queries[-1:], keys, mask[-1:])[0], sequence.visual
                )
            sequence.cache.append((keys, values))
            return gathered(queries, keys, values, mask)
        assert sequence.remaining is not None  # the layers below have run
        here = sequence.remaining
        sequence.cache.append((keys[here], values[here]))
        gathered_there = gathered(
            queries[here], *sequence.cache[layer], seen(len(here), len(here), window, queries)
        )
        return queries.new_zeros(queries.shape[0], gathered_there.shape[1]).index_copy(
            0, here, gathered_there
        )

    def _ranked(self, received: Tensor, visual: slice) -> Tensor:
        """The places that remain, rising: all text, and the visual tokens that receive most."""
        num_visual = visual.stop - visual.start
        top = received[visual].argsort(descending=True, stable=True)[: self._budget.num_tokens(num_visual)]
        place = torch.arange(len(received), device=received.device)
        return torch.cat([place[: visual.start], visual.start + top.sort().values, place[visual.stop :]])


@torch.inference_mode()
def _decoded(vlm: VLM, decoder: Decoder, requests: Sequence[Request], pruned: _Pruned) -> list[Caption]:
    for request in requests:
        request.check_fits(decoder.max_positions)
    [eos] = vlm.generator.prompts.answer_ids("")
    embeddings = torch.cat([request.embeddings for request in requests])
    positions = torch.cat([request.positions for request in requests])
    pruned.lengths = [len(request) for request in requests]
    answers: list[list[int]] = [[] for _ in requests]
    while True:
        states = decoder.forward(embeddings, positions.to(decoder.device), pruned)
        last = torch.tensor(pruned.lengths).cumsum(0) - 1
        ids = decoder.logits(states[last.to(states.device)]).argmax(-1)
        for request, answer, token_id in zip(requests, answers, ids.tolist(), strict=True):
            if eos not in answer and len(answer) < request.max_new_tokens:
                answer.append(token_id)
        if all(
            eos in answer or len(answer) == request.max_new_tokens
            for request, answer in zip(requests, answers, strict=True)
        ):
            break
        positions = positions[last] + 1
        embeddings, pruned.lengths = decoder.embed(ids), [1] * len(requests)
    return [
        _caption(vlm, request, sequence, answer, eos)
        for request, sequence, answer in zip(requests, pruned.sequences, answers, strict=True)
    ]


def _caption(vlm: VLM, request: Request, sequence: _Sequence, answer: list[int], eos: int) -> Caption:
    ids = tuple(answer[: answer.index(eos)] if eos in answer else answer)
    num_full = sequence.visual.stop - sequence.visual.start
    assert sequence.remaining is not None  # the prompt has been prefilled
    return Caption(
        text=vlm.generator.prompts.decode(ids).strip(),
        token_ids=ids,
        finish_reason="stop" if eos in answer else "length",
        prompt_tokens=len(request),
        visual_tokens_full=num_full,
        visual_tokens_kept=len(sequence.remaining) - (len(request) - num_full),
    )


def _visual(vlm: VLM, request: Request, prompt: str) -> slice:
    """Where the visual tokens lie in a request."""
    prefix, suffix = vlm.generator.prompts.split(prompt)
    return slice(len(prefix), len(request) - len(suffix))
