"""What an evaluation asks: pictures, and questions about them with the right answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one picture.

    ``answers`` are all right; ``metric`` is a name of ``hired.evaluation.scoring``. ``picture`` names the
    picture, so that questions about the same one are found together.
    """

    key: str
    task: str
    picture: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError(f"the item {self.key!r} has no right answer")
        if self.max_new_tokens < 1:
            raise ValueError(f"the item {self.key!r} lets no answer be given: {self.max_new_tokens} tokens")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's file and all that is asked about it."""

    key: str
    data: bytes
    items: tuple[Item, ...]
