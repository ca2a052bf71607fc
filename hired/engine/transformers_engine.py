"""Generation on any language model of transformers: one left-padded batch, a forward a token.

Written to be right and plain; it is the measure for faster engines. Costs: padding is computed, a finished
row runs on until the last one ends, and every step comes back to the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hired.engine import Event, Outcome, Request, answers_in_order
from hired.engine.answer import Answer
from hired.engine.sampling import choose
from hired.errors import CapacityError


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

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        """One answer a request; those beyond the context are CapacityErrors and join no batch."""
        return answers_in_order(self.stream(requests))

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """All requests in one batch, told step by step."""
        accepted: dict[int, Request] = {}
        for index, request in enumerate(requests):
            try:
                request.check_fits(self._max_positions)
                accepted[index] = request
            except CapacityError as error:
                yield Event(index, outcome=error)
        if accepted:
            yield from self._decode_batch(accepted)

    def _decode_batch(self, requests: dict[int, Request]) -> Iterator[Event]:
        answers = [Answer(request, self._eos_token_ids, self._decode) for request in requests.values()]
        samplings = [request.sampling for request in requests.values()]
        embeddings, mask, positions = _pad_left(list(requests.values()))
        cache = DynamicCache(config=self._text_config)
        inputs = {"inputs_embeds": embeddings}
        for step in itertools.count():
            with torch.inference_mode():
                logits = self._model(
                    **inputs,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                next_ids = choose(logits.float(), samplings, [step] * len(answers))
            for index, answer, token_id in zip(requests, answers, next_ids.tolist(), strict=True):
                if answer.outcome is None:
                    taken = answer.take(token_id)
                    yield Event(index, taken, answer.outcome)
            if all(answer.outcome is not None for answer in answers):
                return
            inputs = {"input_ids": next_ids.clamp(min=0)[:, None]}
            mask = torch.cat([mask, mask.new_ones(len(answers), 1)], dim=1)
            positions = positions[:, -1:] + 1


def _pad_left(requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``[b, n, d]``, attention mask and position ids int64 ``[b, n]``, prompts flush right."""

    def flush_right(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")

    embeddings = flush_right([request.embeddings for request in requests])
    device = embeddings.device
    mask = flush_right([torch.ones_like(request.positions) for request in requests]).to(device)
    return embeddings, mask, flush_right([request.positions for request in requests]).to(device)
