"""The embedded model's tokenizer: byte-level BPE whose merges know the questions' lower-case words only.

Capitals and digits stay single tokens, so what a sign says is spelt glyph by glyph; any other text is bytes.
"""

from __future__ import annotations

import itertools
from typing import Any

from hired.embedded.lexicon import COLOURS, COLS, ROWS, SHAPES

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _phrases() -> list[str]:
    """Every word that questions and answers are made of, as it stands in them."""
    things = [*SHAPES, "sign", "bar", "bars", "chart", *(f"{s}s" for s in SHAPES), "crosses", "signs"]
    places = [f" at {row} {col}" for row, col in itertools.product(ROWS, COLS)]
    return [
        "Describe the image.", "What does the sign say?", "What color is the shape?", "Which shape is",
        "Is there a", "What is at", "How many are there?", "What is the value of the bar?",
        "yes", "no", "a", " a", " saying", " of",
        *(f" {thing}" for thing in things), *SHAPES, *(f" {c}" for c in COLOURS), *COLOURS, *places,
    ]  # fmt: skip


def build_tokenizer() -> Any:
    """A transformers fast tokenizer, the same on every call."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS, IMAGE, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_phrases(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
        model_max_length=4096,
    )
