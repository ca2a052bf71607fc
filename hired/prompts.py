"""A prompt as the checkpoint was trained to see it, and its answer back as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from hired.errors import GenerationError, ModelError

Halves = tuple[tuple[int, ...], tuple[int, ...]]


class PromptTemplate:
    """Renders prompts through the checkpoint's own chat template.

    ``split(prompt)`` gives the token ids before the image and after it, or raises GenerationError.

    ``processor`` is transformers' processor of the checkpoint. Checkpoints without a chat template get
    LLaVA's first one, ``USER: <image>\\n{prompt} ASSISTANT:``.
    Raises ModelError when the template does not place exactly one image.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._tokenizer = processor.tokenizer
        # A job asks thousands of images the same; rendering and tokenising take a third of a millisecond.
        self.split: Callable[[str], Halves] = lru_cache(maxsize=1024)(self._split)
        self._renderer = next((owner for owner in (processor, self._tokenizer) if owner.chat_template), None)
        self._image_token_id = image_token_id
        self._image_token = str(self._tokenizer.convert_ids_to_tokens(image_token_id))
        if self._token_ids("?").count(image_token_id) != 1:
            raise ModelError(
                f"the checkpoint's chat template does not write the image token {self._image_token!r} once "
                "for a message of one image and one text; mend its chat_template"
            )

    def render(self, prompt: str) -> str:
        """The whole prompt with one image token where the visual tokens belong."""
        if self._renderer is None:
            return f"USER: {self._image_token}\n{prompt} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        return str(self._renderer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))

    def _split(self, prompt: str) -> Halves:
        """The token ids before the image and after it.

        Raises GenerationError when the prompt smuggles in image tokens of its own.
        """
        ids = tuple(self._token_ids(prompt))
        if ids.count(self._image_token_id) != 1:
            raise GenerationError(
                f"the prompt must not contain the model's image token {self._image_token!r}"
            )
        image = ids.index(self._image_token_id)
        return ids[:image], ids[image + 1 :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def answer_ids(self, answer: str, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of an answer as the model would write it, closed by the end of sequence if ``ended``.

        Tokenised on its own: tokenizers whose words begin with a space put it there themselves.
        """
        ids: list[int] = self._tokenizer(answer, add_special_tokens=False).input_ids
        return (*ids, self._tokenizer.eos_token_id) if ended else tuple(ids)

    def _token_ids(self, prompt: str) -> list[int]:
        rendered = self.render(prompt)
        bos_token = self._tokenizer.bos_token  # some templates write it themselves: never begin twice
        has_bos = bos_token is not None and rendered.startswith(bos_token)
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=not has_bos).input_ids
        return ids
