"""How likely the model finds a given answer under given visual tokens (teacher forcing).

Finer than the answer itself: dropping a token may change the likelihood long before it changes a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hired.evaluation.language import CausalAttention, Prompt, decoder_of, groups
from hired.types import Caption, VisualTokens

if TYPE_CHECKING:
    from hired.engine.decoder import Decoder
    from hired.vlm import VLM


def log_likelihoods(
    vlm: VLM,
    tokens: Sequence[VisualTokens],
    prompts: str | Sequence[str],
    answers: str | Caption | Sequence[str | Caption],
) -> list[Tensor]:
    """Natural logarithms of the probability of each token of each answer, float32 ``[n]``, on the host.

    One prompt or answer for all rows, or one a row. The end of sequence counts as a token, but for a
    ``Caption`` that was cut off by its limit. Positions and newlines are the generator's own. Raises
    CapacityError for a row beyond the model's context, GenerationError for a prompt with image tokens, and
    ConfigurationError for an engine that does not show its language model.
    """
    count = len(tokens)
    asked = [prompts] * count if isinstance(prompts, str) else prompts
    said = [answers] * count if isinstance(answers, str | Caption) else answers
    ids = [answer_ids(vlm, answer) for answer in said]
    rows = list(zip(tokens, asked, ids, strict=True))
    decoder = decoder_of(vlm)
    lengths = [len(image) + len(answer) for image, _, answer in rows]  # near enough to bound memory
    return [
        likelihood for some in groups(lengths) for likelihood in _log_likelihoods(vlm, decoder, rows[some])
    ]


def answer_ids(vlm: VLM, answer: str | Caption) -> tuple[int, ...]:
    """The token ids whose likelihood is asked for."""
    prompts = vlm.generator.prompts
    if isinstance(answer, Caption):
        end = prompts.answer_ids("") if answer.finish_reason == "stop" else ()
        return answer.token_ids + end
    return prompts.answer_ids(answer)


@torch.inference_mode()
def _log_likelihoods(
    vlm: VLM, decoder: Decoder, rows: Sequence[tuple[VisualTokens, str, tuple[int, ...]]]
) -> list[Tensor]:
    prompts = [_forced(vlm, decoder, *row) for row in rows]
    lengths = [len(prompt) for prompt in prompts]
    states = decoder.forward(
        torch.cat([prompt.embeddings for prompt in prompts]),
        torch.cat([prompt.positions for prompt in prompts]),
        CausalAttention(decoder, lengths),
    )
    # The state before a token foretells it; the last token of an answer was not put in.
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [slice(end - len(ids), end) for end, (_, _, ids) in zip(ends, rows, strict=True)]
    logits = decoder.logits(torch.cat([states[span] for span in spans]))
    wanted = torch.tensor([token_id for _, _, ids in rows for token_id in ids], device=logits.device)
    told = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].cpu()
    return list(torch.split(told, [len(ids) for _, _, ids in rows]))


def _forced(vlm: VLM, decoder: Decoder, tokens: VisualTokens, prompt: str, ids: tuple[int, ...]) -> Prompt:
    """The prompt and all of its answer but the last token."""
    request = vlm.generator.request(tokens, prompt, max_new_tokens=max(1, len(ids)))
    request.check_fits(decoder.max_positions)
    put_in = torch.tensor(ids[:-1], dtype=torch.int64, device=decoder.device)
    after = int(request.positions[-1]) + 1 + torch.arange(len(put_in))
    return Prompt(
        torch.cat([request.embeddings, decoder.embed(put_in)]),
        torch.cat([request.positions, after]).to(decoder.device),
    )
