"""Text as it is generated: the pieces that no later token can change, up to the first stop text."""

from collections.abc import Sequence

from llm_jax.interop.tokenizer import Portable

BROKEN = "\ufffd"  # what a character stands for whose bytes aren't all there yet
SIGHT = 8  # ids of what stands before that are looked at


class TextStream:
    """Token ids in, certain text out. What might be the beginning of a stop text is held back.

    before: ids that the text goes on from, of which some stay in sight: what a token is spelled as can depend
    on those before it. SentencePiece's space is one only inside a text, and bytes are a character together.
    """

    def __init__(self, tokenizer: Portable, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = self._last_whole([int(i) for i in before])
        self._new = len(self._ids)  # where in _ids those begin whose text hasn't been given
        self._held = ""
        self.stopped = ""  # the stop text that came

    def push(self, token: int) -> str:
        """The text that has become certain with one more token."""
        if token in self._tokenizer.unwritten:
            return ""
        self._ids.append(token)
        text = self._text()
        if text.endswith(BROKEN):
            return ""
        self._held += text
        self._ids = self._ids[self._new :]
        self._new = len(self._ids)
        return self._release()

    def rest(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        self._held += self._text()
        certain = self._release()
        if not self.stopped:
            certain, self._held = certain + self._held, ""
        return certain

    def _text(self) -> str:
        """The text of the new ids after those before them."""
        decode = self._tokenizer.decode
        return decode(self._ids)[len(decode(self._ids[: self._new])) :]

    def _last_whole(self, ids: list[int]) -> list[int]:
        """The last ids that are whole characters, as few as possible."""
        written = [token for token in ids[-SIGHT:] if token not in self._tokenizer.unwritten]
        ends = (written[start:] for start in reversed(range(len(written))))
        return next((end for end in ends if BROKEN not in self._tokenizer.decode(end)), [])

    def _release(self) -> str:
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found)
            return self._held[:place]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def _overlap(self, stop: str) -> int:
        """How many of the last characters are the first of a stop text."""
        sizes = range(min(len(stop), len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
