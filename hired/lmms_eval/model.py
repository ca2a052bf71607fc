"""lmms-eval's two interfaces to a model, over the encoder and the engine of this project.

In the simple interface a request is a text and a picture beside it, in the chat one a message that holds
both. Either becomes a prompt of one picture; the checkpoint's own chat template says where the picture goes.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL.Image import Image

import hired
from hired import policies
from hired.engine import GREEDY, Sampling
from hired.errors import ConfigurationError, HiredError, ImageError

log = logging.getLogger(__name__)

# Where a task does not say; a word or two is what most of them want.
MAX_NEW_TOKENS = 64
IMAGE_TOKEN = "<image>"  # how tasks mark the picture's place in a text, whatever the model calls it


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: who asks, the picture, the text, and how to answer."""

    name: str
    image: Image
    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


class HiredModel(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """What both interfaces share.

    ``pretrained`` is ``embedded``, a checkpoint's folder or a hub id. ``token_budget`` with a decimal point
    is a rate, 1.0 for all tokens; without one a number of tokens. ``max_new_tokens`` holds where a task gives
    no limit. So many requests as ``batch_size`` says are encoded and asked together; the engine runs as many
    of them at once as its memory holds. Raises ConfigurationError for what it does not know.
    """

    def __init__(
        self,
        pretrained: str = "embedded",
        *,
        token_budget: float | int = 0.2,
        policy: str = "hired",
        alpha: float = 0.5,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval's own option, for models that search for theirs
        if unknown:
            raise ConfigurationError(
                f"--model_args: the model 'hired' knows no {', '.join(sorted(unknown))}; it takes "
                "pretrained, token_budget, policy, alpha, device, dtype, batch_size, max_new_tokens"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigurationError(
                "the model 'hired' runs in one process: start one a GPU, each with tasks of its own"
            )
        self._batch_size = _positive("batch_size", 32 if batch_size is None else batch_size)
        self._max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self._budget = _budget(token_budget, alpha)
        self._policy = policies.get(policy)
        self._vlm = hired.load(pretrained, device=device, dtype=dtype)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request, in order. What cannot be answered raises: it would count as wrong."""
        results: list[Any] = []
        num_kept = num_full = 0
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            asked = [self._asked(request.args) for request in batch]
            for request, caption in zip(batch, self._answers(asked), strict=True):
                num_kept += caption.visual_tokens_kept
                num_full += caption.visual_tokens_full
                counts = TokenCounts(
                    input_tokens=caption.prompt_tokens, output_tokens=caption.completion_tokens
                )
                results.append(GenerationResult(text=caption.text, token_counts=counts))
                self.cache_hook.add_partial("generate_until", request.args, caption.text)
            log.info("%d of %d requests answered", len(results), len(requests))
        if results:
            log.info(
                "visual tokens an image, newlines included: %.1f of %.1f",
                num_kept / len(results),
                num_full / len(results),
            )
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """None of the paper's benchmarks asks for it."""
        raise NotImplementedError("the model 'hired' answers tasks of output_type generate_until only")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """One picture, one question."""
        raise NotImplementedError("the model 'hired' answers tasks of output_type generate_until only")

    @abstractmethod
    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        """What a request's arguments mean."""

    def _answers(self, asked: Sequence[Asked]) -> Iterator[hired.Caption]:
        partitions = [self._partition(one) for one in asked]
        tokens = self._vlm.encode(partitions, budget=self._budget, policy=self._policy)
        answers = self._vlm.generator.generate(
            tokens,
            [one.prompt for one in asked],
            max_new_tokens=[one.max_new_tokens for one in asked],
            stop=[one.stop for one in asked],
            sampling=[one.sampling for one in asked],
        )
        for one, answer in zip(asked, answers, strict=True):
            if isinstance(answer, HiredError):
                raise HiredError(f"{one.name} cannot be answered: {answer}") from answer
            yield answer

    def _partition(self, asked: Asked) -> hired.Partitions:
        try:
            return self._vlm.partition(asked.image)
        except ImageError as error:
            raise HiredError(f"{asked.name}: the picture cannot be used: {error}") from error

    def _request(self, name: str, images: Sequence[Any], text: str, options: Mapping[str, Any]) -> Asked:
        if len(images) != 1 or not isinstance(images[0], Image):
            raise ConfigurationError(
                f"{name} has {len(images)} visuals ({', '.join(type(image).__name__ for image in images)}); "
                "the model 'hired' is asked about one picture at a time"
            )
        if (options.get("num_beams") or 1) != 1:
            raise ConfigurationError(f"{name} wants num_beams={options['num_beams']}; 'hired' has no beams")
        until = options.get("until") or ()
        return Asked(
            name=name,
            image=images[0],
            prompt=text.replace(IMAGE_TOKEN, "").strip(),
            max_new_tokens=int(options.get("max_new_tokens") or self._max_new_tokens),
            stop=tuple(word for word in ((until,) if isinstance(until, str) else until) if word),
            sampling=_sampling(options),
        )


class HiredSimple(HiredModel):
    """Requests of a text, with pictures that the task finds in the document."""

    is_simple = True

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        context, options, doc_to_visual, doc_id, task, split = arguments
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        return self._request(f"document {doc_id} of {task}", images or (), context, options)


class HiredChat(HiredModel):
    """Requests of messages: one by the user, whose picture and texts come in any order."""

    is_simple = False

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        _, doc_to_messages, options, doc_id, task, split = arguments
        name = f"document {doc_id} of {task}"
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if [message["role"] for message in messages] != ["user"]:
            raise ConfigurationError(
                f"{name} is a conversation of {', '.join(message['role'] for message in messages)}; "
                "the model 'hired' answers a single message of the user"
            )
        [message] = messages
        images = [part["url"] for part in message["content"] if part["type"] != "text"]
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        return self._request(name, images, "\n".join(texts), options)


def _budget(token_budget: float | int, alpha: float) -> hired.Budget:
    if isinstance(token_budget, float):
        return hired.Budget(rate=token_budget, alpha=alpha)
    if token_budget == 1:
        raise ConfigurationError("token_budget=1 could mean all tokens or one: write 1.0 to keep all")
    return hired.Budget(tokens=token_budget, alpha=alpha)


def _positive(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number from 1")
    return number


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy unless the task asks for a temperature and does not forbid to sample."""
    temperature = float(options.get("temperature") or 0)
    if not temperature or options.get("do_sample") is False:
        return GREEDY
    return Sampling(temperature=temperature, top_p=float(options.get("top_p") or 1), seed=0)
