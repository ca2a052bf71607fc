"""Prompts as the checkpoint's template writes them, one image token in each."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from hired.errors import ConfigurationError, ModelError, PromptError
from hired.prompts import Conversation, Message, PromptTemplate, about_one_image
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
    with pytest.raises(PromptError, match="<image>"):
        template.split("Look: <image>")


def test_a_template_that_forgets_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="chat template"):
        PromptTemplate(processor(tmp_path, "{{ messages[0]['content'][1]['text'] }}"), IMAGE_ID)


def test_decoding_leaves_special_tokens_out(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, CHAT_TEMPLATE), IMAGE_ID)
    before, after = template.split("Wörter 漢")
    assert template.decode([*before, IMAGE_ID, *after]) == "USER: \nWörter 漢 ASSISTANT:"


# Conversations

TALK: Conversation = (
    Message("user", ("Compare", None, None)),
    Message("assistant", ("They differ.",)),
    Message("user", (None, "And this?")),
)


def test_a_conversation_of_one_question_is_the_prompt(tmp_path: Path) -> None:
    for chat_template in (CHAT_TEMPLATE, None):
        template = PromptTemplate(processor(tmp_path, chat_template), IMAGE_ID)
        for prompt in PROMPTS:
            assert template.pieces(about_one_image(prompt)) == template.split(prompt)


def test_the_pieces_around_several_images_are_those_of_transformers(tmp_path: Path) -> None:
    transformers_processor = processor(tmp_path, CHAT_TEMPLATE)
    picture = Image.new("RGB", (48, 48))
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": picture} if part is None else {"type": "text", "text": part}
                for part in message.parts
            ],
        }
        for message in TALK
    ]
    ids = transformers_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    ).input_ids[0]
    one_image = transformers_processor(images=picture, text="<image>").input_ids[0].count(IMAGE_ID)

    expected, images_left = [], 0
    for token_id in ids:
        if token_id != IMAGE_ID:
            images_left = 0
            expected.append(token_id)
            continue
        if images_left == 0:
            expected.append(token_id)
            images_left = one_image
        images_left -= 1
    pieces = PromptTemplate(transformers_processor, IMAGE_ID).pieces(TALK)
    assert len(pieces) == 4
    joined = [token_id for piece in pieces[:-1] for token_id in (*piece, IMAGE_ID)] + list(pieces[-1])
    assert joined == expected


def test_without_a_template_conversations_are_llavas_first(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, None), IMAGE_ID)
    told = template.render((Message("system", ("Be brief.",)), *TALK))
    assert told == (
        "Be brief. USER: <image>\n<image>\nCompare ASSISTANT: They differ.</s>"
        "USER: <image>\nAnd this? ASSISTANT:"
    )


def test_a_conversation_without_images_is_one_piece(tmp_path: Path) -> None:
    template = PromptTemplate(processor(tmp_path, CHAT_TEMPLATE), IMAGE_ID)
    [piece] = template.pieces((Message("user", ("Hello",)),))
    assert template.decode(piece) == "USER: Hello ASSISTANT:"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_no_message_can_bring_images_of_its_own(tmp_path: Path, role: str) -> None:
    template = PromptTemplate(processor(tmp_path, CHAT_TEMPLATE), IMAGE_ID)
    smuggler = Message(role, ("a <image>",))  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="must not contain"):
        template.pieces((smuggler, Message("user", (None, "b"))))


def test_a_template_that_refuses_or_leaves_out_is_the_prompts_error(tmp_path: Path) -> None:
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(PromptError, match="one only"):
        PromptTemplate(processor(tmp_path / "a", refusing), IMAGE_ID).pieces(TALK)
    forgetting = CHAT_TEMPLATE.replace("for message in messages", "for message in messages[-1:]")
    with pytest.raises(PromptError, match="leaves out"):
        PromptTemplate(processor(tmp_path / "b", forgetting), IMAGE_ID).pieces(TALK)


def test_nobody_else_takes_part_in_a_conversation() -> None:
    with pytest.raises(ConfigurationError, match="tool"):
        Message("tool", ("42",))  # type: ignore[arg-type]
