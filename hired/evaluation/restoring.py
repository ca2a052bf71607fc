"""Was something needed thrown away? Dropped tokens are given back, one group at a time.

A group is what a policy dropped of a neighbourhood of ``block`` x ``block`` patches in one partition: small
beside a budget, and large enough to hold a few letters or a shape's edge. Given back alone, its gain is how
much the logarithm of the answer's likelihood rises, in nats. A group was needed where the answer becomes at
least twice as likely (``NEEDED``).

With a hundred groups a question the largest gain is large by chance alone: whatever is given back jolts the
model a little. So every count of gains stands beside the same count of losses. Tokens that are needed only
together go unseen; the loss against keep-all shows how much no single group explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from scipy.stats import spearmanr

from hired.budget import Budget
from hired.evaluation.likelihood import log_likelihoods
from hired.evaluation.statistics import Bootstrap, Interval, mean
from hired.policies import Policy
from hired.types import Caption, Partitions, VisualTokens

if TYPE_CHECKING:
    from hired.vlm import VLM

BLOCK = 3
NEEDED = math.log(2)
KEEP_ALL = Budget(rate=1.0)
# Two groups are always in some order.
MIN_GROUPS = 3

Kind = Literal["full-image", "sub-image"]


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is asked about a picture. Without an ``answer`` the one given with all tokens counts as right."""

    key: str
    task: str
    picture: str
    partitions: Partitions
    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that were dropped together.

    ``gain`` in nats. ``distance`` is that of the group's middle from the nearest token that was kept in its
    partition, in patches; infinite where none was. ``scores`` are the means of its tokens' CLS attention, by
    layer.
    """

    partition: int
    num_tokens: int
    distance: float
    scores: Mapping[int, float]
    gain: float

    @property
    def kind(self) -> Kind:
        return "sub-image" if self.partition else "full-image"


@dataclass(frozen=True, slots=True)
class Restored:
    """One question: the answer's log-likelihood with the policy's tokens and with all, and its groups."""

    key: str
    task: str
    picture: str
    with_kept: float
    with_all: float
    groups: tuple[Group, ...]

    @property
    def loss(self) -> float:
        """What dropping cost, in nats; negative where the answer became likelier."""
        return self.with_all - self.with_kept

    @property
    def largest_gain(self) -> float:
        return max((group.gain for group in self.groups), default=0.0)

    @property
    def largest_harm(self) -> float:
        """How much the most misleading group costs."""
        return max((-group.gain for group in self.groups), default=0.0)

    def correlation(self, layer: int) -> float | None:
        """Spearman's, of the scores of a layer and the gains; None where there is no order to compare."""
        scores = [group.scores[layer] for group in self.groups]
        gains = [group.gain for group in self.groups]
        if len(gains) < MIN_GROUPS or len(set(gains)) == 1 or len(set(scores)) == 1:
            return None
        return float(spearmanr(scores, gains).statistic)


@dataclass(frozen=True, slots=True)
class Restoring:
    """All questions under one policy and budget; ``layers`` are those whose scores were compared."""

    policy: str
    budget: Budget
    block: int
    layers: tuple[int, ...]
    questions: tuple[Restored, ...]

    @property
    def groups(self) -> list[Group]:
        return [group for question in self.questions for group in question.groups]

    @property
    def hurt(self) -> Restoring:
        """The questions whose answer dropping made at most half as likely."""
        return self.among(lambda question: question.loss >= NEEDED)

    def of_task(self, task: str) -> Restoring:
        return self.among(lambda question: question.task == task)

    def among(self, holds: Callable[[Restored], bool]) -> Restoring:
        """The questions for which something holds."""
        return replace(self, questions=tuple(filter(holds, self.questions)))

    def share(self, holds: Callable[[Restored], bool]) -> Interval:
        """Of the questions for which something holds, with what other pictures might have given."""
        bootstrap = Bootstrap([question.picture for question in self.questions])
        return bootstrap.interval(mean([float(holds(question)) for question in self.questions]))

    def correlation(self, layer: int) -> Interval | None:
        """The mean over questions of ``Restored.correlation``; None where no question has one."""
        found = [
            (question.picture, rho)
            for question in self.questions
            if (rho := question.correlation(layer)) is not None
        ]
        if not found:
            return None
        return Bootstrap([picture for picture, _ in found]).interval(mean([rho for _, rho in found]))


def restore(
    vlm: VLM,
    questions: Iterable[Question],
    *,
    budget: Budget,
    policy: Policy,
    block: int = BLOCK,
    max_new_tokens: int = 64,
) -> Restoring:
    """Gives every group of every question back, once each, and measures.

    The scores compared are those of HiRED's two layers, 0 and the feature layer, whatever the policy.
    ``max_new_tokens`` limits keep-all's answer where the right one is not known. Needs a policy that drops
    tokens; one that merges them has changed those that it kept, and what is given back is then unchanged.
    """
    layers = tuple(dict.fromkeys((0, vlm.encoder.feature_layer)))
    done = tuple(
        _restored(vlm, question, budget, policy, block, layers, max_new_tokens) for question in questions
    )
    return Restoring(policy.name, budget, block, layers, done)


def _restored(
    vlm: VLM,
    question: Question,
    budget: Budget,
    policy: Policy,
    block: int,
    layers: tuple[int, ...],
    max_new_tokens: int,
) -> Restored:
    cut = [question.partitions]
    [everything] = vlm.encode(cut, budget=KEEP_ALL, policy="keep-all")
    [kept] = vlm.encode(cut, budget=budget, policy=policy)
    [attention] = vlm.encoder.cls_attention(cut, layers=layers)
    answer: str | Caption | None = question.answer
    if answer is None:
        [answer] = vlm.generate([everything], question.prompt, max_new_tokens=max_new_tokens)
    dropped = list(neighbourhoods(everything, kept, vlm.tiling.patches_per_side, block))
    given_back = [joined(kept, everything, group) for group in dropped]
    told = log_likelihoods(vlm, [kept, everything, *given_back], question.prompt, answer)
    with_kept, with_all, *after = (float(each.double().sum()) for each in told)
    groups = [
        Group(
            partition=int(everything.partition[group[0]]),
            num_tokens=len(group),
            distance=_distance(everything, kept, group, vlm.tiling.patches_per_side),
            scores={
                layer: float(attention[layer][everything.partition[group], everything.patch[group]].mean())
                for layer in layers
            },
            gain=log_likelihood - with_kept,
        )
        for group, log_likelihood in zip(dropped, after, strict=True)
    ]
    return Restored(question.key, question.task, question.picture, with_kept, with_all, tuple(groups))


def neighbourhoods(
    everything: VisualTokens, kept: VisualTokens, patches_per_side: int, block: int
) -> Iterator[torch.Tensor]:
    """Which tokens of ``everything`` are not ``kept``, int64 ``[m]``, neighbourhood by neighbourhood."""
    patches = patches_per_side**2
    place = everything.partition * patches + everything.patch
    dropped = (~torch.isin(place, kept.partition * patches + kept.patch)).nonzero()[:, 0]
    row, col = everything.patch // patches_per_side // block, everything.patch % patches_per_side // block
    neighbourhood = (everything.partition * patches_per_side + row) * patches_per_side + col
    for each in torch.unique(neighbourhood[dropped]):
        yield dropped[neighbourhood[dropped] == each]


def joined(kept: VisualTokens, everything: VisualTokens, group: torch.Tensor) -> VisualTokens:
    """``kept`` and the tokens number ``group`` of ``everything``, in the order that tokens have."""
    partition = torch.cat([kept.partition, everything.partition[group]])
    patch = torch.cat([kept.patch, everything.patch[group]])
    order = (partition * (int(patch.max()) + 1) + patch).argsort()
    features = torch.cat([kept.features, everything.features[group]])
    return replace(kept, features=features[order], partition=partition[order], patch=patch[order])


def _distance(
    everything: VisualTokens, kept: VisualTokens, group: torch.Tensor, patches_per_side: int
) -> float:
    own = kept.patch[kept.partition == everything.partition[group[0]]]
    if not len(own):
        return math.inf
    places = torch.stack(
        [everything.patch[group] // patches_per_side, everything.patch[group] % patches_per_side]
    )
    middle = places.double().mean(-1, keepdim=True)
    there = torch.stack([own // patches_per_side, own % patches_per_side])
    return float((there - middle).square().sum(0).sqrt().min())
