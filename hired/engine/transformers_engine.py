"""Greedy generation on any language model of transformers: one left-padded batch, a forward a token.

Written to be right and plain; it is the measure for faster engines. Costs: padding is computed, a finished
row runs on until the last one ends, and every step comes back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hired.engine import Completion, FinishReason, Request
from hired.errors import CapacityError, GenerationError


class TransformersEngine:
    """Continues prompts with a causal language model whose ``forward`` takes embeddings and gives logits.

    ``eos_token_ids`` end an answer; ``decode`` turns ids into the text in which stop strings are sought.
    The context's limit is ``max_position_embeddings`` of the model's text configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._model = model
        self._text_config = model.config.get_text_config()
        self._max_positions: int | None = getattr(self._text_config, "max_position_embeddings", None)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode

    def generate(self, requests: Sequence[Request]) -> list[Completion | GenerationError]:
        """One answer a request; those beyond the context are CapacityErrors and join no batch."""
        refusals = [self._refusal(request) for request in requests]
        accepted = [request for request, refusal in zip(requests, refusals, strict=True) if refusal is None]
        completions = iter(self._decode_batch(accepted) if accepted else [])
        return [next(completions) if refusal is None else refusal for refusal in refusals]

    def _refusal(self, request: Request) -> CapacityError | None:
        try:
            request.check_fits(self._max_positions)
        except CapacityError as error:
            return error
        return None

    @torch.inference_mode()
    def _decode_batch(self, requests: Sequence[Request]) -> list[Completion | GenerationError]:
        answers = [_Answer(request, self._eos_token_ids, self._decode) for request in requests]
        embeddings, mask, positions = _pad_left(requests)
        cache = DynamicCache(config=self._text_config)
        inputs = {"inputs_embeds": embeddings}
        while True:
            logits = self._model(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            next_ids = logits.argmax(-1)
            numeric = ~logits.isnan().any(-1)
            for answer, token_id, is_number in zip(answers, next_ids.tolist(), numeric.tolist(), strict=True):
                answer.take(token_id, is_number)
            if all(answer.outcome for answer in answers):
                return [answer.outcome for answer in answers if answer.outcome]
            inputs = {"input_ids": next_ids[:, None]}
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
            positions = positions[:, -1:] + 1


class _Answer:
    """One request's ids so far and, once it has ended, its outcome."""

    def __init__(
        self, request: Request, eos_token_ids: Collection[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._request = request
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._token_ids: list[int] = []
        self.outcome: Completion | GenerationError | None = None

    def take(self, token_id: int, is_number: bool) -> None:
        """Add the next token, unless the answer has ended."""
        if self.outcome:
            return
        if not is_number:  # its argmax would be an id like any other, and the caption fluent nonsense
            self.outcome = GenerationError(
                "the language model's scores are not numbers; run it in bfloat16 or float32"
            )
        elif token_id in self._eos_token_ids:
            self._end("stop")
        else:
            self._token_ids.append(token_id)
            if self._holds_stop_string():
                self._end("stop")
            elif len(self._token_ids) == self._request.max_new_tokens:
                self._end("length")

    def _holds_stop_string(self) -> bool:
        if not self._request.stop:
            return False
        text = self._decode(self._token_ids)
        return any(stop in text for stop in self._request.stop)

    def _end(self, reason: FinishReason) -> None:
        self.outcome = Completion(tuple(self._token_ids), reason)


def _pad_left(requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``[b, n, d]``, attention mask and position ids int64 ``[b, n]``, prompts flush right."""

    def flush_right(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")

    embeddings = flush_right([request.embeddings for request in requests])
    mask = flush_right([torch.ones_like(request.positions) for request in requests])
    return embeddings, mask, flush_right([request.positions for request in requests])
