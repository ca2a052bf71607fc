"""Prompts as the checkpoint's template writes them, one image token in each."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from hired.errors import GenerationError, ModelError
from hired.prompts import PromptTemplate
from tests.tiny import BOS_ID, CHAT_TEMPLATE, IMAGE_ID, tiny_llava_next

PROMPTS = ["What is it?", "", "Ünïcode 漢字\n", "{{ bos_token }}", "ASSISTANT: <im age>"]


def processor(folder: Path, chat_template: str | None) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(tiny_llava_next(folder, chat_template=chat_template))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_ids_around_the_image_are_those_of_transformers(tmp_path: Path, prompt: str) -> None:
    transformers_processor = processor(tmp_path, CHAT_TEMPLATE)
    content = [{"type": "image", "image": Image.new("RGB", (48, 48))}, {"type": "text", "text": prompt}]
    expected = transformers_processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    ).input_ids[0]
    first, num_image_tokens = expected.index(IMAGE_ID), expected.count(IMAGE_ID)

    before, after = PromptTemplate(transformers_processor, IMAGE_ID).split(prompt)
    assert list(before) == expected[:first]
    assert list(after) == expected[first + num_image_tokens :]
    assert before.count(BOS_ID) == 1


def test_a_template_may_leave_the_first_token_to_the_tokenizer(tmp_path: Path) -> None:
    transformers_processor = processor(tmp_path, CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    before, after = PromptTemplate(transformers_processor, IMAGE_ID).split("What?")
    assert (before + after).count(BOS_ID) == 1
    assert before[0] == BOS_ID


def test_without_a_template_the_prompt_is_llavas_first(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, None), IMAGE_ID)
    assert template.render("What?") == "USER: <image>\nWhat? ASSISTANT:"


def test_a_prompt_cannot_bring_images_of_its_own(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, CHAT_TEMPLATE), IMAGE_ID)
    with pytest.raises(GenerationError, match="<image>"):
        template.split("Look: <image>")


def test_a_template_that_forgets_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="chat template"):
        PromptTemplate(processor(tmp_path, "{{ messages[0]['content'][1]['text'] }}"), IMAGE_ID)


def test_decoding_leaves_special_tokens_out(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, CHAT_TEMPLATE), IMAGE_ID)
    before, after = template.split("Wörter 漢")
    assert template.decode([*before, IMAGE_ID, *after]) == "USER: \nWörter 漢 ASSISTANT:"
