"""How much do captions change when tokens are dropped? Measured on anybody's images, without labels.

Keep-all's caption is the measure, so this says how faithful a budget is, not how right. Three views of it,
from the coarsest: is the caption the same, which of its words are the same, and how likely is keep-all's
caption once tokens are gone. The last sees changes long before a word changes, and is what a budget is
suggested by: greedy captions part at the first changed word and then differ in many that say the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from hired.budget import Budget
from hired.errors import ConfigurationError, GenerationError, ImageError
from hired.evaluation.likelihood import log_likelihoods
from hired.evaluation.statistics import Bootstrap, Interval, mean
from hired.policies import Policy
from hired.types import Caption, Partitions

if TYPE_CHECKING:
    from PIL.Image import Image

    from hired.vlm import VLM

# A token of keep-all's caption may be 5 % less likely on average.
TOLERANCE = 0.05
KEEP_ALL = Budget(rate=1.0)
BATCH_SIZE = 8
MAX_NAMED = 50


@dataclass(frozen=True, slots=True)
class Refused:
    """An image that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One image under one budget, against the same image with all tokens.

    ``log_likelihood`` is the mean over the tokens of keep-all's caption under the tokens that are left,
    ``change`` that less the same with all tokens; both in nats a token.
    """

    name: str
    caption: str
    keep_all_caption: str
    visual_tokens_kept: int
    visual_tokens_full: int
    log_likelihood: float
    change: float

    @property
    def is_exact(self) -> bool:
        return self.caption == self.keep_all_caption

    @property
    def f1(self) -> float:
        return token_f1(self.caption, self.keep_all_caption)


@dataclass(frozen=True, slots=True)
class AtBudget:
    """All images at one budget."""

    budget: Budget
    images: tuple[Compared, ...]

    @property
    def mean_tokens(self) -> float:
        """The visual tokens that reached the language model, newlines included."""
        return sum(image.visual_tokens_kept for image in self.images) / len(self.images)

    @property
    def exact(self) -> Interval:
        return self._interval([float(image.is_exact) for image in self.images])

    @property
    def f1(self) -> Interval:
        return self._interval([image.f1 for image in self.images])

    @property
    def change(self) -> Interval:
        """Of the log-likelihood, in nats a token. Pairs of one image are drawn together."""
        return self._interval([image.change for image in self.images])

    def is_within(self, tolerance: float) -> bool:
        """Whether a token of keep-all's caption is, with what the interval allows, likely enough still."""
        return math.exp(self.change.low) >= 1 - tolerance

    def _interval(self, values: Sequence[float]) -> Interval:
        return Bootstrap([image.name for image in self.images]).interval(mean(values))


@dataclass(frozen=True, slots=True)
class Fidelity:
    """All budgets, the largest first, and the images that took no part."""

    policy: str
    prompt: str
    budgets: tuple[AtBudget, ...]
    refused: tuple[Refused, ...]

    def suggestion(self, tolerance: float = TOLERANCE) -> Budget | None:
        """The smallest budget within the tolerance of which no larger one is outside; None if there is none.

        ``tolerance`` is by how much less likely a token of keep-all's caption may become, a geometric mean
        over tokens, then over images; the lower end of the interval decides.
        """
        found = None
        for at in self.budgets:
            if not at.is_within(tolerance):
                break
            found = at.budget
        return found


def fidelity(
    vlm: VLM,
    images: Iterable[tuple[str, bytes | Image | Refused]],
    prompt: str,
    budgets: Sequence[Budget],
    policy: Policy,
    *,
    max_new_tokens: int = 64,
) -> Fidelity:
    """Captions of named images at each budget against those with all tokens.

    An image that cannot be decoded, or whose prompt does not fit, is among the ``refused``, as is one that
    its reader refused. Raises ConfigurationError where nothing is left to measure.
    """
    if not budgets:
        raise ConfigurationError("fidelity needs at least one budget to compare with keep-all")
    refused: list[Refused] = []
    compared: list[list[Compared]] = [[] for _ in budgets]
    partitioned = _partitioned(vlm, images, refused)
    while batch := list(islice(partitioned, BATCH_SIZE)):
        for rows, found in zip(
            compared, _compared(vlm, batch, prompt, budgets, policy, max_new_tokens, refused), strict=True
        ):
            rows += found
    if not compared[0]:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in refused[:3])
        raise ConfigurationError(f"there is no image to measure{f' ({reasons})' if reasons else ''}")
    results = [AtBudget(budget, tuple(rows)) for budget, rows in zip(budgets, compared, strict=True)]
    results.sort(key=lambda at: -at.mean_tokens)
    return Fidelity(policy.name, prompt, tuple(results), tuple(refused))


def _partitioned(
    vlm: VLM, images: Iterable[tuple[str, bytes | Image | Refused]], refused: list[Refused]
) -> Iterator[tuple[str, Partitions]]:
    for name, image in images:
        if isinstance(image, Refused):
            refused.append(image)
            continue
        try:
            yield name, vlm.partition(image)
        except ImageError as error:
            refused.append(Refused(name, str(error)))


def _compared(
    vlm: VLM,
    batch: Sequence[tuple[str, Partitions]],
    prompt: str,
    budgets: Sequence[Budget],
    policy: Policy,
    max_new_tokens: int,
    refused: list[Refused],
) -> Iterator[list[Compared]]:
    """The images of a batch at each of the budgets."""
    everything = vlm.encode([partitions for _, partitions in batch], budget=KEEP_ALL, policy="keep-all")
    answers = vlm.generator.generate(everything, [prompt] * len(batch), max_new_tokens=max_new_tokens)
    names: list[str] = []
    wanted: list[Caption] = []
    cut: list[Partitions] = []
    whole = []
    for (name, partitions), tokens, answer in zip(batch, everything, answers, strict=True):
        if isinstance(answer, GenerationError):
            refused.append(Refused(name, str(answer)))
        else:
            names.append(name)
            wanted.append(answer)
            cut.append(partitions)
            whole.append(tokens)
    before = [float(each.mean()) for each in log_likelihoods(vlm, whole, prompt, wanted)]
    for budget in budgets:
        kept = vlm.encode(cut, budget=budget, policy=policy)
        captions = vlm.generate(kept, prompt, max_new_tokens=max_new_tokens)
        after = [float(each.mean()) for each in log_likelihoods(vlm, kept, prompt, wanted)]
        yield [
            Compared(
                name=name,
                caption=caption.text,
                keep_all_caption=reference.text,
                visual_tokens_kept=caption.visual_tokens_kept,
                visual_tokens_full=caption.visual_tokens_full,
                log_likelihood=now,
                change=now - then,
            )
            for name, caption, reference, now, then in zip(
                names, captions, wanted, after, before, strict=True
            )
        ]


def token_f1(one: str, other: str) -> float:
    """Of the words of two texts, whatever their order and case: 1 for the same, 0 for nothing in common.

    Two texts without words are the same.
    """
    words, others = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    if not words and not others:
        return 1.0
    return 2 * (words & others).total() / (words.total() + others.total())


def page(result: Fidelity, *, command: str, model: str, tolerance: float = TOLERANCE) -> str:
    """The result as Markdown."""
    num_images = len(result.budgets[0].images)
    lines = [
        "# What dropping tokens changes in these captions",
        "",
        f"Model: {model}. Policy: {result.policy}. Prompt: {result.prompt!r}. {num_images} images. "
        f"Made by `{command}`.",
        "",
        "Against the captions with all tokens, whether those are right or not. Likelihood: that of a token "
        "of keep-all's caption under the tokens that are left, a geometric mean, as a share of what it was "
        "with all tokens. In brackets 95 % intervals, images drawn anew.",
        "",
        "| budget | visual tokens | same caption | same words (F1) | likelihood kept |",
        "|---|---|---|---|---|",
        *map(_row, result.budgets),
        "",
        _suggested(result, tolerance),
        "",
    ]
    if result.refused:
        lines += [
            f"## Images that took no part: {len(result.refused)}",
            "",
            *(f"- {each.name}: {each.reason}" for each in result.refused[:MAX_NAMED]),
            *([f"- and {more} more"] if (more := len(result.refused) - MAX_NAMED) > 0 else []),
            "",
        ]
    return "\n".join([*lines, *_changed(result)])


def _row(at: AtBudget) -> str:
    change = at.change
    kept, low, high = (f"{100 * math.exp(value):.1f}" for value in (change.measured, change.low, change.high))
    exact, f1 = at.exact, at.f1
    return (
        f"| {_shown(at.budget)} | {at.mean_tokens:.0f} | "
        f"{100 * exact.measured:.0f} % ({100 * exact.low:.0f} to {100 * exact.high:.0f}) | "
        f"{f1.measured:.3f} ({f1.low:.3f} to {f1.high:.3f}) | {kept} % ({low} to {high}) |"
    )


def _suggested(result: Fidelity, tolerance: float) -> str:
    budget = result.suggestion(tolerance)
    limit = f"at least {100 * (1 - tolerance):g} % of the likelihood kept, by the lower end of the interval"
    if budget is None:
        return (
            f"No budget measured here is within the tolerance ({limit}): keep all tokens, or try larger ones."
        )
    return f"Suggested: **{_shown(budget)}**, the smallest budget within the tolerance ({limit})."


def _changed(result: Fidelity, count: int = 5) -> Iterator[str]:
    """The captions that the smallest budget changed most, to be looked at."""
    smallest = result.budgets[-1]
    changed = sorted(
        (image for image in smallest.images if not image.is_exact), key=lambda image: image.change
    )
    if changed:
        yield f"## Changed most at {_shown(smallest.budget)}"
        yield ""
        yield "| image | with all tokens | with those that are left |"
        yield "|---|---|---|"
        for image in changed[:count]:
            cells = (image.name, image.keep_all_caption, image.caption)
            yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _shown(budget: Budget) -> str:
    """A budget as a page shows it."""
    return f"{budget.rate:.3g}" if budget.rate is not None else f"{budget.tokens} tokens"
