"""What is compared: a policy under a budget, and how what remains is laid out for the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hired.budget import Budget
from hired.errors import ConfigurationError
from hired.packing import Newlines, Positions
from hired.policies import Policy


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of answering: ``policy`` chooses under ``budget``, then ``newlines`` and ``positions`` pack.

    ``name`` tells arms apart that share a policy; the same name at several budgets makes a curve. Raises
    ConfigurationError without a name and for words that packing does not know.
    """

    name: str
    policy: Policy
    budget: Budget
    newlines: Newlines = "rows"
    positions: Positions = "original"

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("an arm needs a name, by which its results are found again")
        for option, known in (("newlines", Newlines), ("positions", Positions)):
            if getattr(self, option) not in get_args(known):
                raise ConfigurationError(
                    f"{option}={getattr(self, option)!r} of the arm {self.name!r}: use one of "
                    f"{', '.join(get_args(known))}"
                )
