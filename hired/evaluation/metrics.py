"""The metrics of the paper's eight benchmarks, as lmms-eval 0.7 computes them.

Each scores one answer, from 0 to 1, against one right one or more; MME and POPE also have scores of a whole
set. Where a metric here departs from lmms-eval its docstring says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

YesOrNo = Literal["yes", "no", "other"]

# EvalAI's words for numbers, articles, and contractions that are written without an apostrophe.
_NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock 'ow's'at oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
# Each is known without any one of its apostrophes. The last is a slip of EvalAI's, which all scores share.
_CONTRACTED = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTIONS.split()
    for at, sign in enumerate(form)
    if sign == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32  # EvalAI takes away no more, having given a flag for a count


def normalised(answer: str) -> str:
    """An answer as EvalAI compares it: lower case, no punctuation, no articles, digits for numbers."""
    words = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _without_words(_without_punctuation(_on_one_line(words)))


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Signs beside a space go, those inside a word become a space; all go where a number has a comma."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_space or has_number else " ")
    return _FULL_STOP.sub("", result, count=_MAX_FULL_STOPS)


def _without_words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2: how many other annotators gave the answer, three being enough, a mean over annotators.

    Annotators' answers lose punctuation, articles and number words only where they are not all the same.
    """
    said, given = normalised(prediction), [_on_one_line(answer) for answer in answers]
    if len(set(given)) > 1:
        said = _without_words(_without_punctuation(said))
        given = [_without_words(_without_punctuation(answer)) for answer in given]
    return _agreement(said, given)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA: as VQAv2, with annotators' answers normalised like the prediction in every case."""
    return _agreement(normalised(prediction), [normalised(answer) for answer in answers])


def _agreement(said: str, given: Sequence[str]) -> float:
    """The mean over annotators i of min(1, how many others than i gave ``said`` / 3)."""
    matches = given.count(said)
    return sum(min(1.0, (matches - (answer == said)) / 3) for answer in given) / len(given)


def textvqa_question(question: str) -> str:
    """The question as TextVQA asks it: capitalised."""
    return question.capitalize()


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """DocVQA: 1 - the smallest edit distance to an answer by the longer one's length; 0 below ``threshold``.

    Of lower-cased text with single spaces. Differs from lmms-eval where a text has more space than that: it
    measures the length before and the distance after.
    """
    said = " ".join(prediction.lower().split())
    similarity = max(_similarity(said, " ".join(answer.lower().split())) for answer in answers)
    return similarity if similarity >= threshold else 0.0


def _similarity(one: str, other: str) -> float:
    return 1 - edit_distance(one, other) / max(len(one), len(other), 1)


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make one from the other."""
    row = list(range(len(other) + 1))
    for i, sign in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (sign != against))
    return row[-1]


def relaxed_accuracy(prediction: str, target: str, *, tolerance: float = 0.05) -> float:
    """ChartQA: numbers within ``tolerance`` of a target that is not 0; else the same text, whatever its case.

    A number with % is divided by 100.
    """
    said, wanted = _number(prediction), _number(target)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= tolerance)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench_accuracy(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """OCRBench: whether an answer lies in the prediction, in lower case.

    ``formula`` is for its part HME100k: as written, without spaces.
    """

    def comparable(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return float(any(comparable(answer) in comparable(prediction) for answer in answers))


def ocrbench_score(right: Sequence[float]) -> float:
    """The sum over OCRBench's 1000 questions, by 1000."""
    return sum(right) / 1000


def scienceqa_accuracy(prediction: str, letter: str) -> float:
    """ScienceQA: the letter alone, or an answer that begins with it and a full stop."""
    return float(prediction == letter or prediction.startswith(f"{letter}."))


def yes_or_no(prediction: str) -> YesOrNo:
    """MME: what an answer says in its first four characters; y and n alone will do."""
    text = prediction.lower().strip().replace(".", "")
    beginning = {"y": "yes", "n": "no"}.get(text, text[:4])
    if "yes" in beginning:
        return "yes"
    return "no" if "no" in beginning else "other"


@dataclass(frozen=True, slots=True)
class MmeAnswer:
    """One answer to one of the two questions about an image of a category."""

    category: str
    image: str
    right: bool


def mme_scores(answers: Iterable[MmeAnswer]) -> dict[str, float]:
    """MME by category: the mean over images of accuracy and accuracy+ (both right), in per cent, at most 200.

    Perception, the paper's MME, is the sum over its ten categories. Raises ValueError for an image that has
    not two answers.
    """
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        images[answer.category][answer.image].append(answer.right)
    return {
        category: sum(_mme_points(image, right) for image, right in of_category.items()) / len(of_category)
        for category, of_category in images.items()
    }


def _mme_points(image: str, right: Sequence[bool]) -> float:
    if len(right) != 2:
        raise ValueError(f"MME asks two questions about an image; {image!r} has {len(right)} answers")
    return 100.0 * sum(right) / 2 + 100.0 * all(right)


@dataclass(frozen=True, slots=True)
class PopeScores:
    """POPE's five figures, from 0 to 1; yes is the positive answer."""

    f1: float
    accuracy: float
    precision: float
    recall: float
    yes_share: float


def pope_answer(prediction: str) -> str:
    """What POPE compares with yes and no: lower case, without a full stop at the end.

    Differs from lmms-eval, which leaves the full stop, so that "Yes." is wrong there.
    """
    return prediction.lower().strip().removesuffix(".")


def pope_scores(predictions: Sequence[str], truths: Sequence[Literal["yes", "no"]]) -> PopeScores:
    """The scores of a whole set; an answer that is neither yes nor no is wrong, and misses nothing.

    As in lmms-eval recall leaves such answers out. Differs from it in ``yes_share``, the share of answers
    that say yes, where it counts the questions whose truth is yes.
    """
    pairs = [(pope_answer(said), truth) for said, truth in zip(predictions, truths, strict=True)]
    if not pairs:
        raise ValueError("POPE has no score without answers")
    hits, false_alarms, misses = (
        pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"))
    )
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    return PopeScores(
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        accuracy=sum(said == truth for said, truth in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        yes_share=(hits + false_alarms) / len(pairs),
    )
