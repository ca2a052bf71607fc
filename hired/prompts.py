"""A prompt as the checkpoint was trained to see it, and its answer back as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

import jinja2

from hired.errors import ConfigurationError, ModelError, PromptError

Halves: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a conversation said: texts, with None in the place of each image."""

    role: Role
    parts: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigurationError(f"the role is {self.role!r}, use one of {', '.join(ROLES)}")

    @property
    def num_images(self) -> int:
        return self.parts.count(None)


Conversation: TypeAlias = tuple[Message, ...]


def about_one_image(prompt: str) -> Conversation:
    """A conversation of one question about one image."""
    return (Message("user", (None, prompt)),)


class PromptTemplate:
    """Renders prompts through the checkpoint's own chat template.

    ``split(prompt)`` gives the token ids before the one image and after it, ``pieces(conversation)`` those
    before, between and after all of its images; both raise PromptError.

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
        if self._token_ids(about_one_image("?")).count(image_token_id) != 1:
            raise ModelError(
                f"the checkpoint's chat template does not write the image token {self._image_token!r} once "
                "for a message of one image and one text; mend its chat_template"
            )

    def render(self, prompt: str | Conversation) -> str:
        """The whole prompt with an image token wherever visual tokens belong."""
        conversation = about_one_image(prompt) if isinstance(prompt, str) else prompt
        if self._renderer is None:
            return self._plainly(conversation)
        messages = [
            {"role": message.role, "content": [_content(part) for part in message.parts]}
            for message in conversation
        ]
        return str(self._renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def pieces(self, conversation: Conversation) -> tuple[tuple[int, ...], ...]:
        """The token ids between the images: one piece more than there are images.

        Raises PromptError when a text smuggles in image tokens of its own, or when the template cannot
        write this conversation.
        """
        if any(self._image_token in part for said in conversation for part in said.parts if part is not None):
            raise self._smuggled()
        try:
            ids = self._token_ids(conversation)
        except jinja2.TemplateError as error:
            raise PromptError(
                f"the checkpoint's chat template refuses this conversation ({error}); try one message of the "
                "user alone"
            ) from error
        images = [place for place, token_id in enumerate(ids) if token_id == self._image_token_id]
        num_images = sum(message.num_images for message in conversation)
        if len(images) < num_images:
            raise PromptError(
                "the checkpoint's chat template leaves out images of this conversation; put them into the "
                "user's messages"
            )
        if len(images) > num_images:
            raise self._smuggled()
        starts = [0, *(place + 1 for place in images)]
        return tuple(tuple(ids[start:end]) for start, end in zip(starts, [*images, len(ids)], strict=True))

    def _split(self, prompt: str) -> Halves:
        before, after = self.pieces(about_one_image(prompt))
        return before, after

    def _smuggled(self) -> PromptError:
        return PromptError(f"the prompt must not contain the model's image token {self._image_token!r}")

    def _plainly(self, conversation: Conversation) -> str:
        """As LLaVA's first version wrote conversations: images before the text of their message."""
        text = ""
        for message in conversation:
            said = " ".join(part for part in message.parts if part is not None)
            said = f"{self._image_token}\n" * message.num_images + said
            match message.role:
                case "system":
                    text += f"{said} "
                case "user":
                    text += f"USER: {said} "
                case "assistant":
                    text += f"ASSISTANT: {said}{self._tokenizer.eos_token or ' '}"
        return text + "ASSISTANT:"

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def answer_ids(self, answer: str, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of an answer as the model would write it, closed by the end of sequence if ``ended``.

        Tokenised on its own: tokenizers whose words begin with a space put it there themselves.
        """
        ids: list[int] = self._tokenizer(answer, add_special_tokens=False).input_ids
        return (*ids, self._tokenizer.eos_token_id) if ended else tuple(ids)

    def _token_ids(self, conversation: Conversation) -> list[int]:
        rendered = self.render(conversation)
        bos_token = self._tokenizer.bos_token  # some templates write it themselves: never begin twice
        has_bos = bos_token is not None and rendered.startswith(bos_token)
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=not has_bos).input_ids
        return ids


def _content(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is None else {"type": "text", "text": part}
