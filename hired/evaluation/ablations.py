"""HiRED with one of its decisions changed, to see what each is worth: the paper's ablations and more.

Allocation without content, other layers, other ways with the heads, and each departure of the published code
alone; all of those departures together are ``hired-reference``. Shares of the full-image, position ids and
newlines need no policy: they are options of an ``Arm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hired.attention import most_attended
from hired.budget import Budget, allocate, visual_content_scores
from hired.errors import ConfigurationError
from hired.evaluation.arms import Arm
from hired.policies.hired import Hired
from hired.policies.policy import Candidates

# How the heads of a layer become one importance a patch: summed, the highest of them, or one head by number.
Heads = Literal["sum", "max"] | int

ALPHAS = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True)
class Ablation(Hired):
    """HiRED but for what the options say; as it stands it is HiRED.

    ``even`` gives sub-images equal shares, whatever their content. ``heads`` are aggregated in both phases:
    ``max`` is our reading of the paper's row "heads not summed", which it does not spell out. Without a sum
    there is one list of scores, heads times patches long, and going down it keeps the patches by the highest
    score that any head gives them. The others are departures of the published code, see ``HiredReference``:

    - ``row_bands``: sub-images are taken for bands of full-image patch rows, one after the other;
    - ``counted``: how many of the int(patches * (1 - alpha)) most attended full-image patches a sub-image
      has, instead of their attention;
    - ``floored``: what floors and limits leave over is given to nobody;
    - ``padded``: the budget counts padding, which is chosen like anything else and then cut off.
    """

    name: ClassVar[str] = "hired-ablation"

    even: bool = False
    heads: Heads = "sum"
    row_bands: bool = False
    counted: bool = False
    floored: bool = False
    padded: bool = False

    def num_tokens(self, budget: Budget, real: Tensor) -> int:
        return budget.num_tokens(real.numel() if self.padded else int(real.sum()))

    def select(self, candidates: Candidates) -> Tensor:
        _, final = self.layers(candidates.feature_layer)
        importance = self._aggregated(candidates, final)
        chosen = most_attended(importance, self.allocate(candidates), among=self._choice(candidates))
        return self._at_least_one(chosen & candidates.real, importance, candidates.real)

    def allocate(self, candidates: Candidates) -> Tensor:
        room = self._choice(candidates).sum(-1)
        scores = self._scores(candidates)
        if not self.floored:
            return allocate(candidates.num_tokens, scores, room, candidates.alpha)
        full_image = (candidates.num_tokens.double() * candidates.alpha).long().minimum(room[:, 0])
        rest = (candidates.num_tokens - full_image)[:, None]
        # The product first: of whole scores it is exact, and so is the floor.
        shares = scores * rest / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.cat([full_image[:, None], shares.long().minimum(room[:, 1:])], dim=-1)

    def _choice(self, candidates: Candidates) -> Tensor:
        """The patches that take part."""
        return candidates.present if self.padded else candidates.real

    def _aggregated(self, candidates: Candidates, layer: int) -> Tensor:
        if self.heads == "sum":
            return candidates.cls_attention[layer]
        by_head = candidates.by_head(layer)
        if self.heads == "max":
            return by_head.amax(-1)
        if not 0 <= self.heads < by_head.shape[-1]:
            raise ConfigurationError(
                f"the tower has the heads 0 to {by_head.shape[-1] - 1}; head {self.heads} was asked for"
            )
        return by_head[..., self.heads]

    def _scores(self, candidates: Candidates) -> Tensor:
        """The visual content score of each sub-image, float64 ``[images, partitions - 1]``."""
        present = candidates.present[:, 1:, 0]
        if self.even:
            return present.double()
        initial, _ = self.layers(candidates.feature_layer)
        content = self._aggregated(candidates, initial)[:, 0]
        if self.counted:
            num_patches = content.shape[-1]
            num_top = present.new_full(
                [len(content)], int(num_patches * (1 - candidates.alpha)), dtype=torch.int64
            )
            content = most_attended(content, num_top, among=candidates.present[:, 0])
        place = _row_bands(candidates) if self.row_bands else candidates.overlap
        return visual_content_scores(content, place)

    def _at_least_one(self, chosen: Tensor, importance: Tensor, real: Tensor) -> Tensor:
        """Floors and padding can take everything; the full-image's most attended token then stays."""
        if not (self.floored or self.padded):
            return chosen
        first = most_attended(importance[:, 0], ~chosen.flatten(1).any(-1), among=real[:, 0])
        return torch.cat([chosen[:, :1] | first[:, None], chosen[:, 1:]], dim=1)


def _row_bands(candidates: Candidates) -> Tensor:
    """In the place of T_pi: the full-image's patches in raster order, a run of them for each sub-image."""
    num_patches, device = candidates.present.shape[-1], candidates.present.device
    num_bands = candidates.present[:, 1:, 0].sum(-1)
    band = torch.arange(num_patches, device=device) * num_bands[:, None] // num_patches
    number = torch.arange(candidates.overlap.shape[1], device=device)
    return (band[:, None] == number[:, None]).float()


def variants(budget: Budget, *, feature_layer: int, num_heads: int) -> list[Arm]:
    """HiRED as ``hired``, and each of its decisions changed alone, at one budget.

    ``feature_layer`` and ``num_heads`` are the tower's; every layer up to the former and each head are tried.
    """
    hired = Arm("hired", Hired(), budget)
    return [
        hired,
        Arm("even allocation", Ablation(even=True), budget),
        *_layers(budget, feature_layer),
        Arm("max over heads", Ablation(heads="max"), budget),
        *(Arm(f"head {head} alone", Ablation(heads=head), budget) for head in range(num_heads)),
        *_departures(budget),
        *(
            replace(hired, name=f"alpha {alpha:.1f}", budget=replace(budget, alpha=alpha))
            for alpha in ALPHAS
            if alpha != budget.alpha
        ),
        replace(hired, name="compact positions", positions="compact"),
        replace(hired, name="all newlines", newlines="all"),
        replace(hired, name="no newlines", newlines="none"),
    ]


def _layers(budget: Budget, feature_layer: int) -> Iterator[Arm]:
    for layer in range(1, feature_layer + 1):
        yield Arm(f"allocation by layer {layer}", Hired(initial_layer=layer), budget)
    for layer in range(feature_layer):
        yield Arm(f"selection by layer {layer}", Hired(final_layer=layer), budget)


def _departures(budget: Budget) -> Iterator[Arm]:
    """What the published code does otherwise, one by one and together; a further one is no newlines."""
    for name, policy in {
        "row bands": Ablation(row_bands=True),
        "top patches counted": Ablation(counted=True),
        "floors given away to nobody": Ablation(floored=True),
        "padding chosen": Ablation(padded=True),
        "all four departures": Ablation(row_bands=True, counted=True, floored=True, padded=True),
    }.items():
        yield Arm(name, policy, budget)
