"""An answer's text as it grows: what can be told of it already, and will not have to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What stands for bytes that are no character yet: the next tokens may complete it.
INCOMPLETE = "\ufffd"
# Tokens that are decoded again with the new ones, since a token's text depends on those before it.
CONTEXT = 8


class TextStream:
    """Token ids in, texts out, which join to the text of the finished caption.

    Held back are characters that are not complete, beginnings of a ``stop`` string, and blanks, which
    captions neither begin nor end with.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._settled = 0  # ids whose text is in self._text
        self._text = ""
        self._told = ""

    def add(self, token_id: int) -> str:
        """What can be told after this token: often its text, sometimes nothing, sometimes more."""
        self._ids.append(token_id)
        context = max(0, self._settled - CONTEXT)
        before = self._decode(self._ids[context : self._settled])
        text = self._decode(self._ids[context:])
        if text.endswith(INCOMPLETE) or not text.startswith(before):
            return ""
        self._text += text[len(before) :]
        self._settled = len(self._ids)
        return self._tell(self._safe())

    def finish(self, text: str) -> str:
        """What is left to tell of the whole text; empty if what was told already is not its beginning."""
        return text[len(self._told) :] if text.startswith(self._told) else ""

    def _safe(self) -> str:
        """The text as far as neither a stop string nor the end of the answer can change it."""
        text = self._text.lstrip()
        for stop in self._stop:
            text = text.partition(stop)[0]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - held].rstrip()

    def _tell(self, text: str) -> str:
        delta = text[len(self._told) :]
        self._told += delta
        return delta


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters may be the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
