"""From visual tokens to captions, around a scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue

import pytest
import torch
from torch import nn
from transformers import AutoProcessor

from hired.engine import Request
from hired.engine.fake import FakeEngine
from hired.engine.shared import SharedEngine
from hired.errors import CapacityError, ConfigurationError, GenerationError, PromptError
from hired.generator import Generator, Piece
from hired.packing import Positions
from hired.prompts import Conversation, Message, PromptTemplate
from hired.types import Caption, Grid, Size, VisualTokens
from tests.language_models import WIDTH as LANGUAGE_WIDTH
from tests.language_models import continuous
from tests.tiny import IMAGE_ID, tiny_llava_next

P, WIDTH = 2, 4
NUM_FULL = P * P + P * (P + 1)  # one sub-image without padding, a newline a row
NEWLINE = torch.full((WIDTH,), -1.0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptTemplate:
    processor = AutoProcessor.from_pretrained(tiny_llava_next(tmp_path_factory.mktemp("checkpoint")))
    return PromptTemplate(processor, IMAGE_ID)


def generator(engine: FakeEngine, prompts: PromptTemplate, positions: Positions = "original") -> Generator:
    projector = nn.Linear(3, WIDTH, bias=False)
    nn.init.constant_(projector.weight, 1.0)
    return Generator(
        engine,
        prompts,
        projector=projector,
        embed_tokens=nn.Embedding(300, WIDTH),
        image_newline=NEWLINE,
        patches_per_side=P,
        positions=positions,
    )


def image(*kept: tuple[int, int]) -> VisualTokens:
    """A square picture's tokens at (partition, patch); the features count up."""
    partition, patch = torch.tensor(kept).T
    features = torch.arange(1.0, len(kept) + 1)[:, None].expand(-1, 3).half()
    return VisualTokens(features, partition, patch, Grid(1, 1), Size(9, 9), 2 * P * P)


def saying(prompts: PromptTemplate, text: str) -> Callable[[Request], Sequence[int]]:
    """The ids of ``text``, without beginning of sequence or template."""
    ids = prompts._tokenizer(text, add_special_tokens=False).input_ids
    return lambda request: ids


def captions(answers: Sequence[Caption | GenerationError]) -> list[Caption]:
    assert all(isinstance(answer, Caption) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Caption)]


def test_the_request_holds_text_projected_tokens_newlines_and_text(prompts: PromptTemplate) -> None:
    engine = FakeEngine(lambda request: [])
    generator(engine, prompts).generate([image((0, 1), (1, 0), (1, 3))], ["What?"])
    before, after = prompts.split("What?")
    request = engine.requests[0]

    visual = request.embeddings[len(before) : -len(after)]
    assert visual[:, 0].tolist() == [3.0, 6.0, -1.0, 9.0, -1.0]
    first = len(before)
    assert request.positions[first : first + 5].tolist() == [first + slot for slot in (1, 4, 6, 8, 9)]
    assert request.positions[first + 5] == first + NUM_FULL


def test_compact_positions_count_what_is_there(prompts: PromptTemplate) -> None:
    engine = FakeEngine(lambda request: [])
    generator(engine, prompts, "compact").generate([image((0, 1), (1, 3))], ["What?"])

    request = engine.requests[0]
    assert request.positions.tolist() == list(range(len(request)))


def test_a_caption_tells_its_text_its_end_and_its_cost(prompts: PromptTemplate) -> None:
    answer = saying(prompts, " A fox. ")
    engine = FakeEngine(answer)
    tokens = image((0, 1), (1, 0), (1, 3))
    [caption] = captions(generator(engine, prompts).generate([tokens], ["What?"]))

    assert caption == Caption(
        text="A fox.",
        token_ids=tuple(answer(engine.requests[0])),
        finish_reason="stop",
        prompt_tokens=sum(map(len, prompts.split("What?"))) + 5,
        visual_tokens_full=NUM_FULL,
        visual_tokens_kept=5,
    )


def test_the_text_ends_before_the_first_stop_string(prompts: PromptTemplate) -> None:
    engine = FakeEngine(saying(prompts, "one. two; three"))
    [caption] = captions(generator(engine, prompts).generate([image((0, 0))], ["?"], stop=[";", "."]))

    assert caption.text == "one"
    assert engine.requests[0].stop == (";", ".")


def test_rows_fail_alone_and_answers_stay_in_order(prompts: PromptTemplate) -> None:
    engine = FakeEngine(lambda request: [40 + request.max_new_tokens], max_positions=200)
    rows = [image((0, 0)), image((0, 1)), image((0, 2)), image((0, 3))]
    answers = generator(engine, prompts).generate(
        rows, ["a", "see <image>", "c", "d"], max_new_tokens=[2, 3, 500, 5]
    )

    assert isinstance(answers[1], GenerationError)
    assert isinstance(answers[2], CapacityError)
    assert [caption.token_ids for caption in captions([answers[0], answers[3]])] == [(42,), (45,)]


def test_no_images_give_no_captions(prompts: PromptTemplate) -> None:
    assert generator(FakeEngine(lambda request: []), prompts).generate([], []) == []


def test_an_unknown_option_is_a_configuration_error(prompts: PromptTemplate) -> None:
    with pytest.raises(ConfigurationError, match="original, compact"):
        generator(FakeEngine(lambda request: []), prompts, "random")  # type: ignore[arg-type]


@pytest.mark.parametrize(("questions", "limits"), [(["a"], 4), (["a", "b"], [4])])
def test_a_prompt_or_limit_too_few_is_a_configuration_error(
    prompts: PromptTemplate, questions: list[str], limits: int | list[int]
) -> None:
    rows = [image((0, 0)), image((0, 1))]
    with pytest.raises(ConfigurationError, match="2 images"):
        generator(FakeEngine(lambda request: []), prompts).generate(rows, questions, max_new_tokens=limits)


def test_prompts_about_one_image_share_all_that_comes_before_their_text(prompts: PromptTemplate) -> None:
    asked = generator(FakeEngine(lambda request: ()), prompts)
    one, other = asked.requests(image((0, 0), (1, 2)), ["What?", "Where is it?"], max_new_tokens=[3, 5])
    [third] = asked.requests(image((0, 0), (1, 2)), ["What?"], max_new_tokens=[3])
    shared = len(one.shared_prefix)
    assert one.shared_prefix == other.shared_prefix != third.shared_prefix
    assert shared == len(prompts.split("What?")[0]) + len(asked.layout(image((0, 0), (1, 2))))
    torch.testing.assert_close(one.embeddings[:shared], other.embeddings[:shared], rtol=0, atol=0)
    assert one.positions[:shared].tolist() == other.positions[:shared].tolist()
    assert [one.max_new_tokens, other.max_new_tokens] == [3, 5]


def test_another_packing_leaves_the_generator_as_it_was(prompts: PromptTemplate) -> None:
    tokens = image((0, 0), (1, 2))
    original = generator(FakeEngine(lambda request: ()), prompts)
    other = original.packing("none", "compact")
    [one], [two] = (list(each.requests(tokens, ["What?"], max_new_tokens=[1])) for each in (original, other))
    assert len(one) == len(two) + 1  # the newline
    assert two.positions.tolist() == list(range(len(two)))
    assert one.positions.tolist() != list(range(len(one)))
    with pytest.raises(ConfigurationError, match="newlines is 'few'"):
        original.packing("few", "compact")  # type: ignore[arg-type]


# Conversations

TALK: Conversation = (
    Message("user", (None, "First?")),
    Message("assistant", ("A fox.",)),
    Message("user", ("Then?", None)),
)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_images_of_a_conversation_stand_where_they_were_shown(
    prompts: PromptTemplate, positions: Positions
) -> None:
    engine = FakeEngine(lambda request: [])
    one, other = image((0, 1), (1, 0), (1, 3)), image((0, 0))
    [caption] = captions(generator(engine, prompts, positions).generate([[one, other]], [TALK]))
    first, between, last = map(len, prompts.pieces(TALK))
    [request] = engine.requests

    visual = request.embeddings[:, 0].tolist()
    assert visual[first : first + 5] == [3.0, 6.0, -1.0, 9.0, -1.0]
    assert visual[first + 5 + between] == 3.0
    assert len(request) == first + 5 + between + 1 + last == caption.prompt_tokens
    assert (caption.visual_tokens_full, caption.visual_tokens_kept) == (2 * NUM_FULL, 6)
    if positions == "compact":
        assert request.positions.tolist() == list(range(len(request)))
    else:
        second = first + NUM_FULL + between
        assert request.positions[first + 5].item() == first + NUM_FULL
        assert request.positions[first + 5 + between].item() == second
        assert request.positions[-1].item() == second + NUM_FULL + last - 1


def test_a_conversation_of_one_question_is_asked_as_the_prompt_is(prompts: PromptTemplate) -> None:
    engine = FakeEngine(lambda request: [])
    tokens = image((0, 1), (1, 3))
    generator(engine, prompts).generate([tokens, [tokens]], ["What?", (Message("user", (None, "What?")),)])
    plain, talk = engine.requests
    assert torch.equal(plain.positions, talk.positions)
    assert plain.shared_prefix == talk.shared_prefix
    assert plain.embeddings.shape == talk.embeddings.shape


def test_a_conversation_may_do_without_images(prompts: PromptTemplate) -> None:
    engine = FakeEngine(lambda request: [])
    [caption] = captions(generator(engine, prompts).generate([[]], [(Message("user", ("Hello",)),)]))
    assert (caption.visual_tokens_full, caption.visual_tokens_kept) == (0, 0)
    assert engine.requests[0].positions.tolist() == list(range(caption.prompt_tokens))


def test_images_and_prompt_must_agree(prompts: PromptTemplate) -> None:
    rows = generator(FakeEngine(lambda request: []), prompts).generate([[image((0, 0))], []], [TALK, "What?"])
    assert [type(row) for row in rows] == [PromptError, PromptError]


def real_speaker(prompts: PromptTemplate) -> Generator:
    """Around a small engine that others may share."""
    torch.manual_seed(0)
    return Generator(
        SharedEngine(continuous()),
        prompts,
        projector=nn.Linear(3, LANGUAGE_WIDTH),
        embed_tokens=nn.Embedding(300, LANGUAGE_WIDTH),
        image_newline=torch.zeros(LANGUAGE_WIDTH),
        patches_per_side=P,
    )


def test_a_listener_is_told_what_a_stream_gives(prompts: PromptTemplate) -> None:
    speaker, tokens = real_speaker(prompts), image((0, 1), (1, 3))
    streamed = list(speaker.stream([tokens], ["What?"], max_new_tokens=9))
    told: SimpleQueue[Piece | Exception | None] = SimpleQueue()
    speaker.listen(tokens, "What?", told.put, max_new_tokens=9)
    assert list(iter(lambda: told.get(timeout=60), None)) == streamed
    assert len(streamed) == 9


def test_a_listener_that_cancels_hears_no_caption(prompts: PromptTemplate) -> None:
    speaker, tokens = real_speaker(prompts), image((0, 1), (1, 3))
    told: SimpleQueue[Piece | Exception | None] = SimpleQueue()
    cancel = speaker.listen(tokens, "What?", told.put, max_new_tokens=60)
    first = told.get(timeout=60)
    cancel()
    pieces = [first, *iter(lambda: told.get(timeout=60), None)]
    assert all(isinstance(piece, Piece) and piece.caption is None for piece in pieces)


def test_what_cannot_be_asked_is_told_to_whoever_asks(prompts: PromptTemplate) -> None:
    alone = generator(FakeEngine(lambda request: []), prompts)
    with pytest.raises(ConfigurationError, match="one caller at a time"):
        alone.listen(image((0, 0)), "What?", lambda piece: None)
    with pytest.raises(PromptError):
        real_speaker(prompts).listen(image((0, 0)), "An <image>?", lambda piece: None)
