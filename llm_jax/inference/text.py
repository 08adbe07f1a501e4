"""Text as it is generated: the pieces that no later token can change, up to the first stop text."""

from collections.abc import Sequence

from llm_jax.interop.tokenizer import Portable

BROKEN = "\ufffd"  # what a character stands for whose bytes aren't all there yet


class TextStream:
    """Token ids in, certain text out. What might be the beginning of a stop text is held back."""

    def __init__(self, tokenizer: Portable, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._before = self._held = ""  # text of the tokens in _ids that has been given; what waits
        self.stopped = ""  # the stop text that came

    def push(self, token: int) -> str:
        """The text that has become certain with one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(BROKEN):
            return ""
        self._held += text[len(self._before) :]
        # A token's text can depend on the one before it (a space at the start), so one is kept.
        self._ids = self._ids[-1:]
        self._before = self._tokenizer.decode(self._ids)
        return self._release()

    def rest(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        self._held += self._tokenizer.decode(self._ids)[len(self._before) :]
        certain, self._held = self._held, ""
        return certain

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
